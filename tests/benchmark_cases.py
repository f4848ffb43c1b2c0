"""The smallest case with everything a benchmark case can have, and ``benchmarks`` importable by path."""

import importlib.util
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
if "benchmarks" not in sys.modules:  # by path: the package is not installed, and another may claim the name
    spec = importlib.util.spec_from_file_location(
        "benchmarks", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["benchmarks"])

from benchmarks import common, machine, measure  # noqa: E402

CPU = torch.device("cpu")
MACHINE = machine.Machine("test machine", "cpu", 1, {"float32": 1e9, "bfloat16": 2e9, "int8": 4e9}, 1e9, "invented")
FACTS = dict.fromkeys(("python", "torch", "triton", "bestrq2", "commit", "command"), "x") | {"date": "2026-01-02T03"}


def square_case(n=1000, **changes):
    """y = x^2 with its gradient: the smallest case with everything a case can have."""
    x = common.seeded(n, dtype=torch.float32, device=CPU).requires_grad_()
    fields = {
        "op": "square",
        "shape": str(n),
        "dtype": torch.float32,
        "device": CPU,
        "inputs": {"x": x},
        "differentiable": ("x",),
        "upstream": common.seeded(n, dtype=torch.float32, device=CPU, seed=1),
        "work": common.Work(flops=n, bytes=8 * n),
        "backward_work": common.Work(flops=2 * n, bytes=12 * n),
        "gold": lambda case: common.gold_of(case, lambda x: x**2),
    }
    return common.Case(**fields | changes)


def provider(name, function, **options):
    return common.Provider(name, lambda case: lambda: function(case.inputs["x"]), **options)


GOOD = provider("good", lambda x: x * x)


def rows_of(providers, case=None, caches=("cold",), repeats=3):
    rows = measure.measure(
        "square",
        case or square_case(),
        providers,
        MACHINE,
        FACTS,
        baseline="good",
        caches=caches,
        budget=measure.Budget(repeats=repeats),
        worker=None,
    )
    assert all(set(row) == set(common.FIELDS) for row in rows), "every row has exactly the columns of the schema"
    return {(row["provider"], row["cache"]): row for row in rows}
