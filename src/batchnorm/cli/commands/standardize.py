"""The command `standardize`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from batchnorm.cli.errors import UsageErrorMaker, library_errors, usage_errors_of
from batchnorm.cli.outputs.reporting import ReportingCommand, print_values
from batchnorm.cli.outputs.writing import check_output, open_output, output_options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from batchnorm.standardize import Standardizer

_BYTES = 2**22  # bytes of the file that are standardized at a time
_SHOWN = 10


@click.command(cls=ReportingCommand)
@click.argument("data", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.npy")
@click.option(
    "--like",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.npy",
    help="Use the mean and deviation of this file, such as the training data, instead of those of FILE.npy.",
)
@click.option(
    "--channel-axis",
    type=int,
    default=1,
    metavar="N",
    help="Axis of the channels; -1 for channels last.",
)
@click.option("--without-mean", is_flag=True, help="Do not subtract the mean.")
@click.option("--without-std", is_flag=True, help="Do not divide by the standard deviation.")
@click.option(
    "--nan-policy",
    type=click.Choice(("omit", "raise", "propagate")),
    default="omit",
    help="Exclude NaN from the statistics and keep it in the file, reject it, or let it propagate.",
)
@output_options("FILE.npy", "the standardized data")
@click.pass_context
def standardize(
    ctx: click.Context,
    /,
    data: Path,
    like: Path | None,
    channel_axis: int,
    without_mean: bool,
    without_std: bool,
    nan_policy: str,
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    r"""Write data with zero mean and unit variance in every feature or channel; files may be larger than memory.

    \b
    Examples:
      batchnorm standardize train.npy -o train-standardized.npy
      batchnorm standardize test.npy --like train.npy -o test-standardized.npy
    """
    from batchnorm.standardize import Standardizer

    usage_error = usage_errors_of(ctx)
    check_output(output, overwrite, usage_error)
    x, source = _opened(data, usage_error), _opened(like or data, usage_error)
    with library_errors(usage_error):
        standardizer = Standardizer(
            with_mean=not without_mean, with_std=not without_std, channel_axis=channel_axis, nan_policy=nan_policy
        ).fit(source)
        first = standardizer.transform(x[:1])
    # NaN may come later in the file.
    with open_output(output, overwrite, usage_error) as file, library_errors(usage_error):
        _write(file, x, first.dtype, standardizer)
    if as_json:
        print_values(
            "standardize",
            samples=len(source),
            features=standardizer.n_features_in_,
            dtype=str(source.dtype),
            missing=_missing(standardizer, source),
            mean=standardizer.mean_.tolist(),
            deviation=(standardizer.var_**0.5).tolist(),
            output=str(output),
        )
        return
    print(_summary(standardizer, source))
    print(f"\nWritten: {output}")


def _opened(path: Path, usage_error: UsageErrorMaker) -> NDArray[Any]:
    import numpy as np

    try:
        held = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        raise usage_error(f"{path} must be a file of numpy.save, but reading it failed", error) from error
    if not isinstance(held, np.ndarray):
        held.close()
        raise usage_error(
            f"{path} must hold one array, as numpy.save writes it, got several. Save the one to standardize."
        )
    return held


def _parts(x: NDArray[Any]) -> Iterator[NDArray[Any]]:
    step = max(1, _BYTES // max(1, x[:1].nbytes))
    return (x[start : start + step] for start in range(0, len(x), step))


def _write(file: BinaryIO, x: NDArray[Any], dtype: np.dtype[Any], standardizer: Standardizer) -> None:
    """Write the standardized data. A full disk raises an error here; with a memory map, it would kill the process."""
    import numpy as np

    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": x.shape}
    np.lib.format.write_array_header_1_0(file, header)
    for part in standardizer.transform(_parts(x)):
        file.write(np.ascontiguousarray(part).data)


def _missing(standardizer: Standardizer, source: NDArray[Any]) -> int:
    """Return the number of values that were excluded from the statistics."""
    features = standardizer.n_features_in_
    seen = standardizer.n_samples_seen_
    return int(source.size - (seen * features if isinstance(seen, (int, float)) else seen.sum()))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _summary(standardizer: Standardizer, source: NDArray[Any]) -> str:
    features = standardizer.n_features_in_
    lines = [f"standardize: {_counted(len(source), 'sample')} of {_counted(features, 'feature')}, {source.dtype}", ""]
    lines.append(f"{'feature':>7}  {'mean':>12}  {'deviation':>12}")
    deviations = standardizer.var_**0.5
    lines += [f"{i:>7}  {standardizer.mean_[i]:>12.6g}  {deviations[i]:>12.6g}" for i in range(min(features, _SHOWN))]
    if features > _SHOWN:
        lines.append(f"    ... and {features - _SHOWN} more")
    if (missing := _missing(standardizer, source)) > 0:
        are = "value is" if missing == 1 else "values are"
        lines += ["", f"{missing:,} {are} NaN: excluded from the statistics, and kept in the result"]
    return "\n".join(lines)
