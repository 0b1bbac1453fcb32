"""The scripts of tools/ as modules: they are no package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import pilotfish

TOOLS = Path(pilotfish.__file__).parent / "tools"
Load = Callable[[str], ModuleType]


@pytest.fixture(scope="session")
def load_tool() -> Load:
    """`load_tool("lock")` runs tools/lock.py as a module."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
