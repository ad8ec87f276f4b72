"""Run a comparison: train every choice with every seed, then write the report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from batchnorm.compare.directory import SCHEMA, SETTINGS, SUMMARY, finished_runs, prepare, write_json
from batchnorm.compare.errors import ComparisonError
from batchnorm.compare.inputs import models
from batchnorm.compare.inputs.choices import Choice, Grid
from batchnorm.compare.inputs.data import Data, load
from batchnorm.compare.inputs.learning_rate import LearningRate
from batchnorm.compare.inputs.models import AnyModels
from batchnorm.compare.inputs.norms import AS_IS, parse_all
from batchnorm.compare.inputs.sampling import Sampling
from batchnorm.compare.inputs.settings import (
    EPOCHS,
    Settings,
    check_counts,
    check_device,
    check_length,
    learning_rates,
    probabilities,
    several,
)
from batchnorm.compare.records import Run
from batchnorm.compare.report.formats import check_formats
from batchnorm.compare.report.headline import percent
from batchnorm.compare.report.results import Result, conclude
from batchnorm.compare.resuming import check_same, earlier_facts, fingerprint
from batchnorm.compare.training import parallel
from batchnorm.compare.training.cells import Cells
from batchnorm.compare.training.environment import restored
from batchnorm.compare.training.parallel import Processes
from batchnorm.compare.training.remaining import Planned, Remaining
from batchnorm.importing import working_directory_importable

Known = dict[tuple[Choice, int], Run]


def run(
    norms: str | Iterable[str] | None = None,
    *,
    model: AnyModels = "mlp",
    data: str | Path | Data = "mnist-mini",
    data_dir: str | Path | None = None,
    batch_size: int | Iterable[int] = 64,
    placement: str | Iterable[str] = "before",
    input_norm: bool = False,
    sampling: str | Iterable[str] = "iid",
    dropout: float | Iterable[float | None] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    lr: float | Iterable[float] | None = None,
    schedule: str = "constant",
    optimizer: str = "sgd",
    seeds: int = 3,
    target_accuracy: float = 0.95,
    evaluate_every: int | None = None,
    threads: int = 1,
    device: str = "cpu",
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    records: str = "jsonl",
    tensorboard: bool = False,
    progress: bool = True,
) -> Result:
    """Train one network with several normalizations, or several networks, on the same data, and report the results.

    With several networks, learning rates, batch sizes, placements, samplings or probabilities of dropout, every
    combination is trained. For each seed, parameters with the same name and shape have the same initial values in all
    networks, and runs with the same batch size and sampling see the same batches in the same order. The order in which
    the networks train changes from seed to seed.

    If torchrun started several processes, or `torch.distributed` is initialized, they train each network together
    under `DistributedDataParallel`, each on its share of every batch. The first process evaluates, writes, and shows
    progress; all return its result. Histograms show the first process's share.

    Args:
        norms: Names of normalizations, such as `["none", "batch"]` or `"none,batch"`. The others are compared with the
            first. `as-is` leaves a finished network unchanged. The default is `none` and `batch` for one network, and
            `as-is` for several.
        model: `mlp`, `sigmoid-mlp`, `cnn`, `resnet20`, `vgg`, a callable, or `module.path:callable`. It is called as
            `callable(norm, in_shape, num_classes)` and returns a `torch.nn.Module` from `[N, *in_shape]` to
            `[N, num_classes]`. It calls `norm(channels)` or, for images, `norm(channels, dims=2)` for each
            normalization. `norm.replaces_bias` is True if the preceding layer can omit its bias. You can also pass a
            finished network: a `torch.nn.Module`, or a callable without arguments that returns one. Each norm then
            replaces its batch normalization. Several networks, as a sequence or as a dict with their names, are
            compared with each other; the others with the first.
        data: `mnist-mini`, `mnist`, `fashion-mnist`, `digits`, the path of an `.npz` file, `module.path:callable`
            (see `batchnorm.compare.load`), or the return value of `load`.
        data_dir: Folder with the data's files, which are then not downloaded.
        batch_size: Samples in each training step, over all processes. One or several values.
        placement: Whether to normalize `before` or `after` the activation. One or both.
        input_norm: Whether to normalize the inputs with a layer without scale and shift, instead of standardizing the
            data.
        sampling: `iid` for a new order in every epoch, or `classes:2` for batches from two classes (or any other
            number). One or several values.
        dropout: Probability of dropout, from 0 to below 1, one or several values. Networks that are built by name have
            dropout before each linear layer that reads hidden units, your own where it calls `norm.dropout()`. In a
            finished network, it replaces the probability of its dropout layers. By default, networks that are built
            have no dropout, and finished networks keep theirs.
        epochs: Number of epochs, which determines the steps for each batch size; 10 if neither this nor `steps` is
            given.
        steps: Number of training steps, instead of `epochs`.
        lr: Learning rate, one or several values; by default 0.1 for `sgd`, 0.01 for `momentum`, 1e-3 for `adam`,
            `adamw` and `rmsprop`.
        schedule: How the rate changes during training: `constant`, `cosine`, `step` or `linear`, optionally with a
            warm-up: `cosine:warmup=100`.
        optimizer: `sgd`, `momentum` (SGD with momentum 0.9), `adam`, `adamw` or `rmsprop`.
        seeds: Number of seeds, counted from 0; at most 10,000.
        target_accuracy: The test accuracy to reach, above 0 and at most 1; the report says when each run reached it.
        evaluate_every: Steps from one evaluation to the next; by default about 80 evaluations, at least 5 steps apart.
        threads: Number of threads that torch uses. One thread gives the same bits and steady times on any machine, and
            is as fast as several for small networks. Large networks benefit from more.
        device: Device to train on, such as `cpu` or `cuda:0`.
        out: Directory for all output, created if necessary; by default a new directory in `batchnorm-compare/`, named
            after the current time.
        overwrite: Whether to replace an earlier comparison in `out`.
        resume: Whether to continue the earlier comparison in `out` without training its finished runs again. You may
            add networks, norms, values and seeds; every other setting that decides a run's result must be the same.
        records: `jsonl`, each run as lines of JSON in `runs/`; or `parquet`, which adds tables of all runs.
        tensorboard: Whether to write TensorBoard logs of every run to `out/tensorboard`.
        progress: Whether to show progress on standard error.

    Returns:
        All records, the outcomes, and the paths of report and pictures.

    Raises:
        ComparisonError: If an argument is invalid, or the model fails; this is a `ValueError`.
        OSError: If the first process cannot write to `out`.
        ModuleNotFoundError: If a package that reports need is missing.
    """
    check_formats(records, tensorboard)
    check_counts(seeds=seeds, threads=threads)
    if overwrite and resume:
        raise ComparisonError("only one of overwrite and resume can be given, got both. Leave one out.")
    if resume and out is None:
        raise ComparisonError("resume needs out, the directory of the comparison to continue, got none. Set out.")
    with working_directory_importable(), restored(threads, device), parallel.processes() as processes:

        def check() -> tuple[Cells, dict[str, Any]]:
            networks = models.resolve_all(model)
            parsed = parse_all(norms or (("none", "batch") if len(networks) == 1 else AS_IS))
            loaded = load(data, data_dir=data_dir, standardize=not input_norm)
            samples, sizes = len(loaded.y_train), several("batch_size", batch_size)
            check_length(samples, sizes, epochs, steps)
            settings = Settings(
                grid=Grid(
                    norm=tuple(norm.spec for norm in parsed),
                    placement=several("placement", placement),
                    lr=learning_rates(optimizer, lr),
                    batch_size=sizes,
                    sampling=several("sampling", sampling),
                    dropout=probabilities(dropout),
                    model=tuple(networks),
                ),
                input_norm=input_norm,
                data=loaded.name if isinstance(data, Data) else str(data),
                data_dir=None if data_dir is None else str(data_dir),
                epochs=None if steps else epochs or EPOCHS,
                steps=steps,
                schedule=schedule,
                optimizer=optimizer,
                seeds=seeds,
                target_accuracy=target_accuracy,
                evaluate_every=evaluate_every,
                threads=threads,
                device=device,
            )
            check_counts(evaluate_every=evaluate_every)
            for choice in settings.grid.choices:
                processes.check(choice.batch_size)
                Sampling.parse(choice.sampling).check(loaded.y_train, choice.batch_size)
                LearningRate.parse(schedule).check(settings.steps_of(choice, samples))
            titles = {norm.spec: norm.title + (f" ({norm.spec})" if ":" in norm.spec else "") for norm in parsed}
            pretrained = [name for name, network in networks.items() if network.pretrained]
            facts = _facts(settings, pretrained, titles, loaded, processes)
            return Cells(settings, networks, loaded.to(check_device(device)), processes), facts

        cells, facts = processes.together(check)
        directory = processes.from_first(Path(out) if out is not None else default_directory())
        return _compare(cells, facts, directory, overwrite, resume, records, tensorboard, progress)


def default_directory() -> Path:
    """Return the path of a new directory, named after the current time."""
    return Path("batchnorm-compare") / datetime.now().strftime("%Y-%m-%d-%H%M%S")


def _compare(
    cells: Cells,
    facts: dict[str, Any],
    directory: Path,
    overwrite: bool,
    resume: bool,
    records: str,
    tensorboard: bool,
    progress: bool,
) -> Result:
    from batchnorm.compare.training.progress import display

    processes, settings = cells.processes, cells.settings
    choices, samples = settings.grid.choices, len(cells.data.y_train)
    earlier = processes.together(lambda: _earlier(directory, facts) if resume and processes.first else None)
    earlier = processes.from_first(earlier)
    facts, known = earlier or (facts, {})
    missing = [
        (choice, seed)
        for seed in range(settings.seeds)
        for choice in choices[seed % len(choices) :] + choices[: seed % len(choices)]
        if (choice, seed) not in known
    ]
    with processes.naming_first_failure():
        costs = cells.warm_up(choice for choice, _ in missing)

    def begin() -> None:
        if earlier is None:
            prepare(directory, overwrite)
        elif missing:
            (directory / SUMMARY).unlink(missing_ok=True)  # it marks a finished comparison
        write_json(directory / SETTINGS, facts)

    processes.on_first(begin)
    plan = [
        Planned(cells.kind_of(choice), settings.steps_of(choice, samples), settings.interval_of(choice, samples))
        for choice, _ in missing
    ]
    total = sum(run.steps for run in plan)
    remaining = Remaining(plan, costs)
    with display(progress and processes.first, len(plan), total, remaining) as shown, processes.naming_first_failure():
        values, values_of = {}, None
        for choice, seed in missing:
            if seed != values_of:
                values, values_of = cells.initial_values(seed), seed
            shown.begin(f"{settings.grid.label(choice)}, seed {seed}", settings.steps_of(choice, samples))
            trained = cells.train(choice, seed, values, directory, tensorboard, shown.step)
            if processes.first:
                shown.end(_outcome(trained))
            known[choice, seed] = trained
    known = processes.from_first(known)
    return conclude(
        directory, facts, list(known.values()), records=records, tensorboard=tensorboard, write=processes.first
    )


def _earlier(directory: Path, facts: dict[str, Any]) -> tuple[dict[str, Any], Known]:
    """Return the facts, with the start time of the earlier comparison, and its finished runs."""
    before = earlier_facts(directory)
    check_same(directory, before, facts)
    return {**facts, "started": before["started"]}, {(run.choice, run.seed): run for run in finished_runs(directory)}


def _outcome(run: Run) -> str:
    if run.diverged_at is not None:
        return f"diverged at step {run.diverged_at}: the loss was not finite"
    last = run.evaluations[-1]
    loss = "not finite" if last.test_loss is None else f"{last.test_loss:.3f}"
    return f"test accuracy {percent(last.test_accuracy)}, test loss {loss}, {last.train_seconds:.2f} s of training"


def _facts(
    settings: Settings, pretrained: list[str], titles: dict[str, str], data: Data, processes: Processes
) -> dict[str, Any]:
    """Return the content of `settings.json`, which is known before training starts."""
    return {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "titles": titles,
        "pretrained": pretrained,
        "data": {
            "name": data.name,
            "train_samples": len(data.y_train),
            "test_samples": len(data.y_test),
            "in_shape": list(data.in_shape),
            "num_classes": data.num_classes,
            "scaling": data.scaling,
            "fingerprint": fingerprint(data),
        },
        "processes": processes.size,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
