// The node of node.h as a Python module, through Python's stable ABI. torch's C++ API is not stable: a library works only
// with the minor version of torch that it was built for.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "node.h"

// From torch/csrc/autograd/python_variable.h, which cannot be included: it needs pybind11, which needs more than
// Python's stable ABI. The build checks that this is its layout.
struct THPVariable {
  PyObject_HEAD
  at::Tensor cdata;
};
TORCH_PYTHON_API extern PyObject* THPVariableClass;
TORCH_PYTHON_API extern PyObject* ParameterClass;
TORCH_PYTHON_API PyObject* THPVariable_Wrap(at::TensorBase&& tensor);

namespace {

using namespace batchnorm;

// An argument that is not of the expected type. Other routes report it.
struct Unexpected {};

const Tensor& tensor(PyObject* o) {
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(o));
  if (type != THPVariableClass && type != ParameterClass &&
      !PyType_IsSubtype(Py_TYPE(o), reinterpret_cast<PyTypeObject*>(THPVariableClass))) {
    throw Unexpected();
  }
  return reinterpret_cast<THPVariable*>(o)->cdata;
}

MaybeTensor maybe_tensor(PyObject* o) { return o == Py_None ? std::nullopt : MaybeTensor(tensor(o)); }

double real(PyObject* o) {
  if (!PyFloat_Check(o) && !PyLong_CheckExact(o)) throw Unexpected();
  const double value = PyFloat_AsDouble(o);
  if (value == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    throw Unexpected();
  }
  return value;
}

Activation activation(PyObject* o) {
  const double number = real(o);
  if (!(number >= 0.0 && number < kActivations)) throw Unexpected();
  return static_cast<Activation>(static_cast<int>(number));
}

// A flag is any object, as in Python: a caller may pass training=1.
bool flag(PyObject* o) {
  if (o == Py_True || o == Py_False) return o == Py_True;
  const int value = PyObject_IsTrue(o);
  if (value < 0) {
    PyErr_Clear();
    throw Unexpected();
  }
  return value != 0;
}

// batch_norm(x, running_mean, running_var, num_batches_tracked, weight, bias, residual, training, eps, activation,
//            parameter, keeps_y, momentum, skip_nonfinite), all by position. The activation is its number in the table.
constexpr Py_ssize_t kArguments = 14;

MaybeTensor called(PyObject* const* a) {
  const Tensor& x = tensor(a[0]);
  const MaybeTensor weight = maybe_tensor(a[4]), bias = maybe_tensor(a[5]), residual = maybe_tensor(a[6]);
  const node::Call call{
      maybe_tensor(a[1]),
      maybe_tensor(a[2]),
      maybe_tensor(a[3]),
      flag(a[7]),
      {real(a[8]), activation(a[9]), real(a[10])},
      flag(a[11]),
      a[12] == Py_None ? std::nullopt : std::optional<double>(real(a[12])),
      flag(a[13]),
  };
  struct WithoutGil {
    PyThreadState* state = PyEval_SaveThread();
    ~WithoutGil() { PyEval_RestoreThread(state); }
  } guard;
  return node::batch_norm(x, weight, bias, residual, call);
}

PyObject* batch_norm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != kArguments) {
    PyErr_SetString(PyExc_TypeError, "batch_norm expects 14 arguments by position. Call batchnorm.functional.batch_norm.");
    return nullptr;
  }
  try {
    MaybeTensor y = called(arguments);
    if (y) return THPVariable_Wrap(std::move(*y));
  } catch (const Unexpected&) {
  } catch (const c10::Error& error) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what_without_backtrace());
    return nullptr;
  } catch (const std::exception& error) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_INCREF(Py_None);
  return Py_None;
}

PyMethodDef kMethods[] = {
    {"batch_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&batch_norm)), METH_FASTCALL,
     "Return y, or None before any change if another route must be used."},
    {nullptr, nullptr, 0, nullptr},
};
// Initialized in two phases, so that the loader need not register it in sys.modules.
PyModuleDef_Slot kSlots[] = {{0, nullptr}};
PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "batchnorm_autograd", nullptr, 0, kMethods, kSlots, nullptr, nullptr,
                       nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_batchnorm_autograd() { return PyModuleDef_Init(&kModule); }
