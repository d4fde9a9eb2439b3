"""The GPU that is current while an operation runs. No GPU is needed: several are pretended."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fasttune_kernels
from fasttune_kernels import dispatch

FOLDER = Path(fasttune_kernels.__file__).parent
entered: list[int] = []


class OnGpu(Tensor):
    """A CPU tensor that says it is on cuda:1."""

    is_cuda = True
    device = torch.device("cuda", 1)  # type: ignore[assignment]


@contextmanager
def made_current(index: int) -> Iterator[None]:
    entered.append(index)
    yield


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    entered.clear()
    monkeypatch.setattr(dispatch, "_has_several_gpus", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", made_current)


@dispatch.custom_op("fasttune_test::doubled")
def doubled(factor: float, xs: list[Tensor], absent: Tensor | None = None) -> Tensor:
    return xs[0] * factor


@dispatch.custom_op("fasttune_test::add_one_", mutates_args=("x",))
def add_one_(x: Tensor) -> None:
    x.add_(1)


def test_the_schema_is_the_bodys() -> None:
    schema = str(doubled._opoverload._schema)
    assert schema.endswith("doubled(float factor, Tensor[] xs, Tensor? absent=None) -> Tensor")
    assert "Tensor(a0!) x" in str(add_one_._opoverload._schema)
    x = torch.ones(2)
    add_one_(x)
    assert x.tolist() == doubled(2.0, [torch.ones(2)]).tolist() == [2.0, 2.0]
    assert entered == []  # the tensors are on the CPU


def test_another_gpu_becomes_current(monkeypatch: pytest.MonkeyPatch) -> None:
    body = doubled._init_fn  # what the dispatcher calls
    gpu = torch.ones(1).as_subclass(OnGpu)
    body(2.0, [gpu])
    assert entered == [1]
    body(2.0, [torch.ones(1)])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    body(2.0, [gpu])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "_has_several_gpus", lambda: False)
    body(2.0, [gpu])
    assert entered == [1]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_operation_is_one_of_dispatch(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if path.stem != "dispatch":
        assert not used & {"torch.library.custom_op", "torch.library.triton_op"}
