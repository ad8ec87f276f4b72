"""The comparison itself: every normalization, every seed, then the report."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.compare import models, parallel
from batchnorm.compare.data import Data, load
from batchnorm.compare.measurements import FirstActivation
from batchnorm.compare.models import BuildModel, Model
from batchnorm.compare.norms import Norm, parse_all
from batchnorm.compare.parallel import Processes
from batchnorm.compare.records import (
    REPORT,
    SETTINGS,
    SUMMARY,
    Recorder,
    Run,
    prepare_directory,
    recording,
    write_atomically,
    write_json,
)
from batchnorm.compare.sampling import Sampling
from batchnorm.compare.settings import Settings, check_counts, evaluation_interval, learning_rate, training_steps
from batchnorm.compare.summary import Outcome, headline, outcomes, percent
from batchnorm.compare.training import OPTIMIZERS, Schedule, train

SAMPLE = 64  # inputs that a network is tried on
EXTRAS = ("jinja2", "matplotlib", "rich")
SCHEMA = 1


@dataclass(frozen=True)
class Result:
    """What a comparison found, and where it lies.

    Attributes:
        settings: What was asked for, with every default filled in.
        runs: Every run with all its records, by seed, then in the order of the norms.
        outcomes: What each norm did over all seeds, in the order of the norms.
        headline: What was found, as sentences.
        summary: The content of `summary.json`.
        out: The directory.
        report_path: The page, `report.html`.
        figure_paths: The pictures.
    """

    settings: Settings
    runs: list[Run]
    outcomes: list[Outcome]
    headline: list[str]
    summary: dict[str, Any]
    out: Path
    report_path: Path
    figure_paths: list[Path]

    def __str__(self) -> str:
        """Returns the headline and where the page lies."""
        return "\n".join([*self.headline, "", f"Report: {self.report_path}"])


def run(
    norms: str | Iterable[str] = ("none", "batch"),
    *,
    model: str | BuildModel = "mlp",
    data: str | Path | Data = "mnist-mini",
    batch_size: int = 64,
    sampling: str = "iid",
    epochs: int | None = None,
    steps: int | None = None,
    lr: float | None = None,
    optimizer: str = "sgd",
    seeds: int = 3,
    target_accuracy: float = 0.95,
    evaluate_every: int | None = None,
    threads: int = 1,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Result:
    """Trains one network with several normalizations on the same data, and reports what each did.

    For each seed, every normalization sees the same batches in the same order, and begins with the same
    initial values wherever its network has a parameter of that name and shape. Which of them is trained
    first changes from seed to seed.

    Where torchrun started several processes, or `torch.distributed` is initialized, they train each network together
    under `DistributedDataParallel`, each on its share of every batch. The first evaluates, writes, and shows progress;
    all return what it found. Histograms are of its share.

    Args:
        norms: Names of normalizations, such as `["none", "batch"]` or `"none,batch"`; the first is what the
            others are compared with.
        model: `mlp`, a callable, or `module.path:callable`. It is called as
            `callable(norm, in_shape, num_classes)` and returns a `torch.nn.Module` from `[N, *in_shape]` to
            `[N, num_classes]`; wherever it wants a normalization it calls `norm(channels)` or, for images,
            `norm(channels, dims=2)`. `norm.replaces_bias` says whether the bias before can be dropped.
        data: `mnist-mini`, the path of an `.npz` file (see `batchnorm.compare.load`), or its return value.
        batch_size: Samples in each training step, of all processes together.
        sampling: `iid`, every epoch in a new order; or `classes:2`, each batch from two classes (or any other number).
        epochs: Passes over the training data; 10 where neither this nor `steps` is given.
        steps: Training steps, instead of `epochs`.
        lr: Learning rate, constant through training; where none is given 0.1 for `sgd`, 0.01 for
            `momentum`, 1e-3 for `adam`, `adamw` and `rmsprop`.
        optimizer: `sgd`, `momentum` (SGD with momentum 0.9), `adam`, `adamw` or `rmsprop`.
        seeds: How many seeds; they are 0, 1, ...
        target_accuracy: The test accuracy whose first reaching is reported, above 0 and at most 1.
        evaluate_every: Steps from one look at the test set to the next; where none is given, such that
            there are about 80.
        threads: Threads that torch computes with meanwhile. One is as fast for small networks, gives the
            same bits and steady times on any machine; large networks want more.
        out: Directory for everything that is written, made if need be; where none is given, a new one
            in `batchnorm-compare/` named after the time.
        overwrite: Whether an earlier comparison in `out` is replaced.
        progress: Whether progress is shown on standard error.

    Returns:
        All records, what was found, and the paths of report and pictures.

    Raises:
        ComparisonError: If something given cannot be compared; it is a `ValueError`.
        OSError: If `out` cannot be written to; on the first process.
        ModuleNotFoundError: If a package that reports need is missing.
    """
    _require_extras()
    parsed = parse_all(norms)
    check_counts(seeds=seeds, threads=threads)
    with models.working_directory_importable(), _restored(threads), parallel.processes() as processes:

        def prepare() -> tuple[Model, Data, Settings]:
            network, loaded = models.resolve(model), load(data)
            total = training_steps(len(loaded.y_train), batch_size, epochs, steps)
            processes.check(batch_size)
            Sampling.parse(sampling).check(loaded.y_train, batch_size)
            return (
                network,
                loaded,
                Settings(
                    norms=tuple(norm.spec for norm in parsed),
                    model=network.name,
                    data=loaded.name,
                    batch_size=batch_size,
                    sampling=sampling,
                    steps=total,
                    lr=learning_rate(optimizer, lr),
                    optimizer=optimizer,
                    seeds=seeds,
                    target_accuracy=target_accuracy,
                    threads=torch.get_num_threads(),
                    evaluate_every=evaluation_interval(total, evaluate_every),
                ),
            )

        network, loaded, settings = processes.together(prepare)
        directory = processes.from_first(Path(out) if out is not None else default_directory())
        with processes.blame():
            _warm_up(parsed, network, loaded, settings, processes)
        return _compare(parsed, network, loaded, settings, directory, overwrite, progress, processes)


def default_directory() -> Path:
    """Returns a directory that is not there yet, named after the time."""
    return Path("batchnorm-compare") / datetime.now().strftime("%Y-%m-%d-%H%M%S")


def _compare(
    norms: list[Norm],
    model: Model,
    data: Data,
    settings: Settings,
    directory: Path,
    overwrite: bool,
    progress: bool,
    processes: Processes,
) -> Result:
    from batchnorm.compare import figures, report
    from batchnorm.compare.progress import display

    facts = processes.from_first(_facts(settings, data, processes))

    def prepare() -> None:
        prepare_directory(directory, figures.NAMES, overwrite)
        write_json(directory / SETTINGS, facts)

    processes.on_first(prepare)
    runs: list[Run] = []
    with display(progress and processes.first, len(norms) * settings.seeds, settings.steps) as shown, processes.blame():
        for seed in range(settings.seeds):
            torch.manual_seed(seed)
            values = models.initial_values(model(norms[0], data.x_train[:SAMPLE], data.num_classes), norms[0])
            turn = seed % len(norms)
            of_seed = {}
            for norm in norms[turn:] + norms[:turn]:
                shown.begin(f"{norm.spec}, seed {seed}")
                run = _run(norm, model, data, settings, seed, values, directory, shown.step, processes)
                if processes.first:
                    shown.end(_ending(run))
                of_seed[norm.spec] = run
            runs += [of_seed[norm.spec] for norm in norms]
    runs = processes.from_first(runs)
    found = outcomes(runs, _titles(norms), settings.target_accuracy)
    sentences = headline(found, settings.target_accuracy, settings.steps)
    summary = {**facts, "headline": sentences, "outcomes": [asdict(outcome) for outcome in found]}
    summary["layers"] = {run.norm: [asdict(layer) for layer in run.layers] for run in runs if run.seed == 0}
    summary["runs"] = {run.file_name: {"shared": run.shared, "own": run.own} for run in runs}
    pictures = figures.draw(runs, settings.target_accuracy) if processes.first else {}
    if processes.first:
        for name, picture in pictures.items():
            write_atomically(directory / name, picture)
        write_atomically(directory / REPORT, report.render(runs, found, summary))
        write_json(directory / SUMMARY, summary)
    return Result(
        settings=settings,
        runs=runs,
        outcomes=found,
        headline=sentences,
        summary=summary,
        out=directory,
        report_path=directory / REPORT,
        figure_paths=[directory / name for name in processes.from_first(list(pictures))],
    )


def _run(
    norm: Norm,
    model: Model,
    data: Data,
    settings: Settings,
    seed: int,
    values: dict[str, Tensor],
    directory: Path,
    on_step: Callable[[int, float], None],
    processes: Processes,
) -> Run:
    """Trains one network, and leaves its file behind."""
    torch.manual_seed(seed)
    sample = data.x_train[:SAMPLE]
    network = model(norm, sample, data.num_classes)
    names = models.share_initial_values(network, norm, values)
    first_activation = FirstActivation(network, norm, sample)
    run = Run(
        norm=norm.spec,
        seed=seed,
        parameters=sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad),
        watched=first_activation.description,
        shared=names["shared"],
        own=names["own"],
    )
    schedule = Schedule(settings.steps, settings.batch_size, settings.evaluate_every, Sampling.parse(settings.sampling))
    processes.seed(seed)  # what dropout draws then does not depend on how the network was built
    optimizer = _optimizer(network, settings)
    with recording(run, directory) if processes.first else _unwritten(run) as recorder:
        train(network, norm, data, optimizer, schedule, first_activation, recorder, on_step, processes)
    return run


@contextmanager
def _unwritten(run: Run) -> Iterator[Recorder]:
    with open(os.devnull, "w") as file:
        yield Recorder(run, file)


def _warm_up(norms: list[Norm], model: Model, data: Data, settings: Settings, processes: Processes) -> None:
    """Trains each network for a moment, so that what fails does so at once, and no run pays for first calls."""
    sampling = Sampling.parse(settings.sampling)
    few = Schedule(min(3, settings.steps), settings.batch_size, settings.steps + 1, sampling)
    for norm in norms:
        torch.manual_seed(0)
        network = model(norm, data.x_train[:SAMPLE], data.num_classes)
        first_activation = FirstActivation(network, norm, data.x_train[:SAMPLE])
        recorder, optimizer = Recorder(Run(norm.spec, 0, 0, None, [], []), io.StringIO()), _optimizer(network, settings)
        train(network, norm, data, optimizer, few, first_activation, recorder, lambda *_: None, processes)


def _optimizer(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return OPTIMIZERS[settings.optimizer].build(parameters, lr=settings.lr)


def _ending(run: Run) -> str:
    if run.diverged_at is not None:
        return f"diverged at step {run.diverged_at}: the loss was not finite"
    last = run.evaluations[-1]
    loss = "not finite" if last.test_loss is None else f"{last.test_loss:.3f}"
    return f"test accuracy {percent(last.test_accuracy)}, test loss {loss}, {last.train_seconds:.2f} s of training"


def _titles(norms: list[Norm]) -> dict[str, str]:
    """Returns what each norm is called in sentences, by its spec."""
    return {norm.spec: norm.title + (f" ({norm.spec})" if ":" in norm.spec else "") for norm in norms}


def _require_extras() -> None:
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"a comparison needs the packages {', '.join(EXTRAS)}, and {', '.join(missing)} cannot be imported. "
            "Install them with: pip install 'batchnorm[compare]'",
            name=missing[0],
        )


@contextmanager
def _restored(threads: int) -> Iterator[None]:
    """Puts back the state of the random generator and the number of threads."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_num_threads(threads)
            yield
        finally:
            torch.set_num_threads(before)


def _facts(settings: Settings, data: Data, processes: Processes) -> dict[str, Any]:
    """Returns what is known before training starts."""
    return {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "data": {
            "name": data.name,
            "train_samples": len(data.y_train),
            "test_samples": len(data.y_test),
            "in_shape": list(data.in_shape),
            "num_classes": data.num_classes,
            "scaling": data.scaling,
        },
        "environment": {
            "batchnorm": importlib.metadata.version("batchnorm"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": _processor(),
            "processes": processes.size,
        },
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()
