// The node of node.h as a Python module, through Python's stable ABI. torch's C++ API is not stable: a library works only
// with the minor version of torch that it was built for.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <memory>
#include <string>

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

// The functions `start` and `start_again` of ops/triton; null before `set_functions`.
PyObject *first_start = nullptr, *start_again = nullptr;

struct Gil {
  PyGILState_STATE state = PyGILState_Ensure();
  ~Gil() { PyGILState_Release(state); }
};

struct Release {
  void operator()(PyObject* o) const { Py_DECREF(o); }
};
using Owned = std::unique_ptr<PyObject, Release>;

PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

// A tuple that is filled from the start. It takes ownership of its objects; a null one is an error of Python.
class Tuple {
 public:
  explicit Tuple(size_t size) : tuple_(PyTuple_New(static_cast<Py_ssize_t>(size))), complete_(tuple_ != nullptr) {}
  void add(PyObject* o) {
    Owned added(o);
    complete_ = complete_ && added && PyTuple_SetItem(tuple_.get(), filled_++, added.release()) == 0;
  }
  PyObject* release() { return complete_ ? tuple_.release() : nullptr; }
  Owned passed_to(PyObject* function) const {
    return Owned(complete_ ? PyObject_CallObject(function, tuple_.get()) : nullptr);
  }

 private:
  Owned tuple_;
  Py_ssize_t filled_ = 0;
  bool complete_;
};

template <class Object>
PyObject* tuple_of(launched::Arguments arguments, const Object& object) {
  Tuple tuple(arguments.size());
  for (const launched::Argument& a : arguments) tuple.add(a.defined() ? object(a) : none());
  return tuple.release();
}

bool start(launched::Pass pass, launched::Arguments arguments, const Attributes& attributes,
           const launched::Update* update) {
  const Gil gil;
  const std::string bytes = launched::key(pass, arguments, attributes, update);
  const auto key = [&] { return PyBytes_FromStringAndSize(bytes.data(), static_cast<Py_ssize_t>(bytes.size())); };
  Tuple again(2);
  again.add(key());
  again.add(tuple_of(arguments, [](const launched::Argument& a) { return PyLong_FromVoidPtr(a.address()); }));
  Owned result = again.passed_to(start_again);
  if (result && result.get() != Py_True) {
    Tuple first(update == nullptr ? 6 : 8);
    constexpr const char* kNames[] = {"train_forward", "normalize", "backward"};
    first.add(PyUnicode_FromString(kNames[static_cast<int>(pass)]));
    first.add(key());
    first.add(tuple_of(arguments, [](const launched::Argument& a) { return THPVariable_Wrap(a.tensor()); }));
    first.add(PyFloat_FromDouble(attributes.eps));
    first.add(PyLong_FromLong(static_cast<long>(attributes.activation)));
    first.add(PyFloat_FromDouble(attributes.parameter));
    if (update != nullptr) {
      first.add(update->momentum ? PyFloat_FromDouble(*update->momentum) : none());
      first.add(PyBool_FromLong(update->skip_nonfinite));
    }
    result = first.passed_to(first_start);
  }
  if (result) return result.get() == Py_True;
  // A thread of autograd cannot pass on an error of Python. The operators report it if it occurs again.
  if (pass != launched::Pass::backward) throw launched::Raised();
  PyErr_Clear();
  return false;
}

// set_functions(start, start_again)
PyObject* set_functions(PyObject*, PyObject* given) {
  if (PyTuple_Size(given) != 2) {
    PyErr_SetString(PyExc_TypeError, "set_functions expects 2 functions by position.");
    return nullptr;
  }
  PyObject** places[] = {&first_start, &start_again};
  for (Py_ssize_t i = 0; i < 2; ++i) {
    PyObject* function = PyTuple_GetItem(given, i);
    Py_INCREF(function);
    Py_XDECREF(*places[i]);
    *places[i] = function;
  }
  launched::start = start;
  return none();
}

// batch_norm(x, running_mean, running_var, num_batches_tracked, weight, bias, residual, training, eps, activation,
//            parameter, keeps_y, momentum, skip_nonfinite, launched), all by position. The activation is its number in
// the table. For statistics of groups of samples or of weighted positions, index, weights, groups and shared follow.
constexpr Py_ssize_t kArguments = 15, kWithParts = 19;

// Increase it with every change of this module's functions, together with INTERFACE in ops/compiled.py.
constexpr long kInterface = 4;

MaybeTensor called(PyObject* const* a, bool with_parts) {
  const Tensor& x = tensor(a[0]);
  const MaybeTensor weight = maybe_tensor(a[4]), bias = maybe_tensor(a[5]), residual = maybe_tensor(a[6]);
  node::Call call{
      maybe_tensor(a[1]),
      maybe_tensor(a[2]),
      maybe_tensor(a[3]),
      flag(a[7]),
      {real(a[8]), activation(a[9]), real(a[10])},
      flag(a[11]),
      a[12] == Py_None ? std::nullopt : std::optional<double>(real(a[12])),
      flag(a[13]),
      flag(a[14]),
  };
  if (call.launched && first_start == nullptr) return std::nullopt;
  if (with_parts) {
    call.parts = parts::Parts{maybe_tensor(a[15]), maybe_tensor(a[16]), static_cast<int64_t>(real(a[17])), flag(a[18])};
  }
  struct WithoutGil {
    PyThreadState* state = PyEval_SaveThread();
    ~WithoutGil() { PyEval_RestoreThread(state); }
  } guard;
  return node::batch_norm(x, weight, bias, residual, call);
}

PyObject* batch_norm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != kArguments && count != kWithParts) {
    PyErr_SetString(PyExc_TypeError,
                    "batch_norm expects 15 or 19 arguments by position. Call batchnorm.functional.batch_norm.");
    return nullptr;
  }
  try {
    MaybeTensor y = called(arguments, count == kWithParts);
    if (y) return THPVariable_Wrap(std::move(*y));
  } catch (const Unexpected&) {
  } catch (const c10::Error& error) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what_without_backtrace());
    return nullptr;
  } catch (const std::exception& error) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  return none();
}

PyMethodDef kMethods[] = {
    {"batch_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&batch_norm)), METH_FASTCALL,
     "Return y, or None before any change if another route must be used."},
    {"set_functions", set_functions, METH_VARARGS, "Set the functions that start a GPU's kernels."},
    {nullptr, nullptr, 0, nullptr},
};
// Initialized in two phases, so that the loader need not register it in sys.modules.
int prepare(PyObject* module) { return PyModule_AddIntConstant(module, "INTERFACE", kInterface); }
PyModuleDef_Slot kSlots[] = {{Py_mod_exec, reinterpret_cast<void*>(prepare)}, {0, nullptr}};
PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "batchnorm_autograd", nullptr, 0, kMethods, kSlots, nullptr, nullptr,
                       nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_batchnorm_autograd() { return PyModuleDef_Init(&kModule); }
