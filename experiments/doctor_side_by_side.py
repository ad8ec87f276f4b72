"""Compare the doctor's findings with the reports of other tools, for the defects in the tests of the doctor's rules.

    pip install lightning torch-audit==0.3.0
    python -m experiments.doctor_side_by_side > docs/doctor/side-by-side.md

For each defect, one network has it and one does not. A tool finds the defect if it reports anything for the first
network that it does not report for the second. Reports of PyTorch and Lightning are warnings in two training steps and
one evaluation step. Reports of torch-audit are the findings of all its phases.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch_audit import audit_dynamic

from batchnorm import diagnose
from batchnorm.doctor.rules import load_rules
from tests.doctor.cases import HEALTHY, PLANTED, Case, healthy
from tests.doctor.networks import batches, criterion

STEPS = 2


def data_of(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Return the data that the network is trained on here, in its dtype."""
    dtype = next(case.model.parameters()).dtype
    return [(x.to(dtype), y) for x, y in (case.data or batches(STEPS))[:STEPS]]


def loss_of(case: Case) -> Callable[..., Tensor]:
    """Return the loss of the case, by default cross-entropy."""
    return case.options.get("loss", criterion)


def optimizer_of(case: Case) -> torch.optim.Optimizer | None:
    """Return the optimizer of the case, by default plain SGD; None if no parameter is trained."""
    trained = [p for p in case.model.parameters() if p.requires_grad]
    return case.options.get("optimizer") or (torch.optim.SGD(trained, 1e-4) if trained else None)


@contextmanager
def reports() -> Iterator[set[str]]:
    """Collect the warnings of the block, and the exception that ends it."""
    reported: set[str] = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield reported
        except Exception as error:
            reported.add(f"{type(error).__name__}: {error}".splitlines()[0])
    reported |= {str(warning.message).splitlines()[0] for warning in caught}


def torch_reports(case: Case) -> set[str]:
    """Return what PyTorch reports."""
    optimizer = optimizer_of(case)
    with reports() as reported:
        case.model.train()
        for x, y in data_of(case):
            loss = loss_of(case)(case.model(x), y)
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        case.model.eval()(data_of(case)[0][0])
    return reported


class Lit(LightningModule):
    """The case as a LightningModule."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.network, self.case = case.model, case

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Return the loss of one step."""
        return loss_of(self.case)(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        """Run the network once."""
        self.network(batch[0])

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the case."""
        return optimizer_of(self.case)


def lightning_reports(case: Case) -> set[str]:
    """Return what Lightning's Trainer reports."""
    data = data_of(case)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with reports() as reported, redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        trainer = Trainer(
            max_steps=STEPS, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu",
        )  # fmt: skip
        trainer.fit(Lit(case), data, data[:1])
    return reported


def audit_reports(case: Case) -> set[str]:
    """Return the rules of torch-audit that fire."""
    optimizer = optimizer_of(case)
    found: set[str] = set()
    with reports(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        case.model.train()
        with audit_dynamic(case.model, optimizer=optimizer, every_n_steps=1, fail_level="FATAL") as auditor:
            auditor.audit_static()
            auditor.audit_init()
            for x, y in data_of(case):
                auditor.audit_data((x, y))
                loss = loss_of(case)(auditor.forward(x), y)
                if optimizer is not None:
                    optimizer.zero_grad()
                    auditor.backward(loss)
                    auditor.optimizer_step()
            found |= {finding.rule_id for finding in auditor.findings}
    return found


def ours(case: Case, code: str) -> str:
    """Return the severity of the doctor's finding."""
    with case.around():
        findings = diagnose(case.model, case.data, **case.options).findings
    return max(finding.severity for finding in findings if finding.code == code).label


def main() -> None:
    """Print the page."""
    print("# Side by side: which tool finds what")
    print(
        "\nEach defect of the tests is planted into a network. The table shows the reports for that network\n"
        "that do not appear for the same network without the defect: warnings of PyTorch and Lightning in two\n"
        "training steps and one evaluation step, and findings of\n"
        "[torch-audit](https://pypi.org/project/torch-audit/) 0.3.0 in all its phases. A dash means that\n"
        "nothing is reported. `python -m experiments.doctor_side_by_side` prints this page.\n"
    )
    print("| defect | PyTorch | Lightning | torch-audit | doctor |\n|---|---|---|---|---|")
    counts = [0, 0, 0, 0]
    for rule in load_rules():
        cells = []
        for reports_of in (torch_reports, lightning_reports, audit_reports):
            more = reports_of(PLANTED[rule.code]()) - reports_of(HEALTHY.get(rule.code, healthy)())
            cells.append("<br>".join(sorted(text[:120].replace("|", "\\|") for text in more)) or "–")
        cells.append(ours(PLANTED[rule.code](), rule.code))
        counts = [count + (cell != "–") for count, cell in zip(counts, cells, strict=True)]
        print(f"| [{rule.code}]({rule.code.lower()}.md) {rule.title} | {' | '.join(cells)} |", flush=True)
    print(f"| **of {len(load_rules())}** | {' | '.join(f'**{count}**' for count in counts)} |")
    print(
        "\nThe defects come from the doctor's own tests, which require that it finds all of them. torch-audit\n"
        "also checks many things other than batch normalization. Some of the defects are harmless, and the\n"
        "doctor reports them as notes."
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
