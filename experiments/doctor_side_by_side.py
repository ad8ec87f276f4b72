"""What others say about the defects that are planted in the tests of the doctor's rules.

    pip install lightning torch-audit==0.3.0
    python -m experiments.doctor_side_by_side > docs/doctor/side-by-side.md

For each defect one network has it, and one does not. A tool has found it if it says something about the first that it
does not say about the second, whatever that is. PyTorch and Lightning say what they warn of in two steps of training
and one of evaluation; torch-audit all that its phases look at.
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
from batchnorm.doctor.rules import RULES
from tests.doctor.cases import HEALTHY, PLANTED, Case, healthy
from tests.doctor.networks import batches, criterion

STEPS = 2


def data_of(case: Case) -> list[tuple[Tensor, Tensor]]:
    """What the network is trained on here, in its dtype."""
    dtype = next(case.model.parameters()).dtype
    return [(x.to(dtype), y) for x, y in (case.data or batches(STEPS))[:STEPS]]


def loss_of(case: Case) -> Callable[..., Tensor]:
    """The case's, else the cross-entropy."""
    return case.options.get("loss", criterion)


def optimizer_of(case: Case) -> torch.optim.Optimizer | None:
    """The case's, else plain SGD; None where nothing is trained."""
    trained = [p for p in case.model.parameters() if p.requires_grad]
    return case.options.get("optimizer") or (torch.optim.SGD(trained, 1e-4) if trained else None)


@contextmanager
def heard() -> Iterator[set[str]]:
    """The warnings of the block, and whatever ends it; numbers and places do not count."""
    said: set[str] = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield said
        except Exception as error:
            said.add(f"{type(error).__name__}: {error}".splitlines()[0])
    said |= {str(warning.message).splitlines()[0] for warning in caught}


def torch_says(case: Case) -> set[str]:
    """PyTorch alone."""
    optimizer = optimizer_of(case)
    with heard() as said:
        case.model.train()
        for x, y in data_of(case):
            loss = loss_of(case)(case.model(x), y)
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        case.model.eval()(data_of(case)[0][0])
    return said


class Lit(LightningModule):
    """The case as Lightning wants it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.network, self.case = case.model, case

    def training_step(self, batch: Any, _: int) -> Tensor:
        """One step."""
        return loss_of(self.case)(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        """One look."""
        self.network(batch[0])

    def configure_optimizers(self) -> Any:
        """The case's."""
        return optimizer_of(self.case)


def lightning_says(case: Case) -> set[str]:
    """Lightning's trainer."""
    data = data_of(case)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with heard() as said, redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        trainer = Trainer(
            max_steps=STEPS, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu",
        )  # fmt: skip
        trainer.fit(Lit(case), data, data[:1])
    return said


def audit_says(case: Case) -> set[str]:
    """torch-audit: the names of its rules."""
    optimizer = optimizer_of(case)
    found: set[str] = set()
    with heard(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
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
    """The severity of our own finding."""
    with case.around():
        findings = diagnose(case.model, case.data, **case.options).findings
    return max(finding.severity for finding in findings if finding.code == code).label


def main() -> None:
    """Print the page."""
    print("# Side by side: who finds what")
    print(
        "\nEach defect of the tests, planted into a network, and what is said about that network and not about the\n"
        "same one without it: by PyTorch and Lightning as warnings in two steps of training and one of evaluation, by\n"
        "[torch-audit](https://pypi.org/project/torch-audit/) 0.3.0 in all its phases. A dash means nothing was said.\n"
        "`python -m experiments.doctor_side_by_side` prints this page.\n"
    )
    print("| defect | PyTorch | Lightning | torch-audit | doctor |\n|---|---|---|---|---|")
    counts = [0, 0, 0, 0]
    for rule in RULES:
        cells = []
        for says in (torch_says, lightning_says, audit_says):
            more = says(PLANTED[rule.code]()) - says(HEALTHY.get(rule.code, healthy)())
            cells.append("<br>".join(sorted(text[:120].replace("|", "\\|") for text in more)) or "–")
        cells.append(ours(PLANTED[rule.code](), rule.code))
        counts = [count + (cell != "–") for count, cell in zip(counts, cells, strict=True)]
        print(f"| [{rule.code}]({rule.code.lower()}.md) {rule.title} | {' | '.join(cells)} |", flush=True)
    print(f"| **of {len(RULES)}** | {' | '.join(f'**{count}**' for count in counts)} |")
    print(
        "\nThe defects are the doctor's own, so that it finds all of them is what its tests demand; torch-audit looks\n"
        "at much else that is no business of batch normalization. Some of these are notes here too: odd, and harmless."
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
