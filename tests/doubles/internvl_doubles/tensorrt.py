"""A stand-in for the `tensorrt` module whose every call binds to the real signatures.

The signatures are read from the docstrings of the published binding
(`tensorrt_cu12_bindings` 10.14.1.48.post1), which imports without TensorRT over
three stub libraries. Nothing is compiled or run: a plan is the ONNX graph with
its weights embedded.
"""

import ctypes
import functools
import importlib
import inspect
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import onnx

BINDING = "tensorrt_bindings"
PLAN = b"fake TensorRT plan: ONNX follows\n"
_SYMBOLS = {
    "libnvinfer.so.10": (
        "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL", "getBuilderPluginRegistry", "getPluginRegistry",
    ),
    "libnvonnxparser.so.10": (
        "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
    "libnvinfer_plugin.so.10": ("initLibNvInferPlugins",),
}  # fmt: skip
_CLASSES = (
    "ILogger", "Logger", "Builder", "INetworkDefinition", "OnnxParser", "IBuilderConfig",
    "IOptimizationProfile", "ITimingCache", "IProgressMonitor", "IHostMemory",
)  # fmt: skip
_ENUMS = ("NetworkDefinitionCreationFlag", "BuilderFlag", "MemoryPoolType", "DataType")
_SCALARS = {
    "int": int, "str": (str, type(None)), "bool": bool, "float": (int, float),
    "buffer": (bytes, bytearray, memoryview),
}  # fmt: skip
_SIGNATURE = re.compile(r"(?:^|\d+\. )(\w+)\((.*)\) -> (.+)$", re.MULTILINE)
_PARAMETER = re.compile(r"(\w+)(?:: ([\w.:]+(?:\[[^\]]*\])?))?(?: = (.+))?$")


def import_binding(folder: Path) -> Any:
    """Import the real binding over stub libraries, which are compiled into a folder."""
    for name, symbols in _SYMBOLS.items():
        source = folder / f"{name}.c"
        source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols))
        library = folder / name
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", library, source]
        subprocess.run(command, check=True)
        # The binding's own search finds what is loaded under its name.
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module(BINDING)


class Module(types.ModuleType):
    """The stand-in; `calls` are those of its objects, in order."""

    def __init__(self, real: Any) -> None:
        super().__init__("tensorrt")
        self.calls: list[str] = []
        self.__version__ = real.__version__
        self.is_building_possible = True
        self.refuses_timing_cache = False
        for name in _ENUMS:
            setattr(self, name, getattr(real, name))
        for name in _CLASSES:
            setattr(self, name, _make_class(self, name, getattr(real, name)))
        self.Logger.WARNING = real.Logger.WARNING


def _make_class(module: Module, name: str, real: type) -> type:
    """Return a class whose methods and properties are those of the real one."""
    bases = tuple(
        getattr(module, base.__name__) for base in real.__bases__ if hasattr(module, base.__name__)
    )
    body: dict[str, Any] = {"_real": real, "_module": module}
    for member in dir(real):
        found = inspect.getattr_static(real, member)
        is_method = callable(found) and (not member.startswith("__") or member == "__init__")
        if is_method and found.__doc__:
            body[member] = _method(name, member, found.__doc__)
    body["__setattr__"] = _set
    if name == "IHostMemory":
        bases = (bytes,)
        body.pop("__init__", None)
        body.pop("__setattr__")
    return type(name, bases or (object,), body)


def _set(self: Any, attribute: str, value: Any) -> None:
    if not attribute.startswith("_") and not hasattr(self._real, attribute):
        raise AttributeError(f"{type(self).__name__} has no attribute {attribute}")
    object.__setattr__(self, attribute, value)


def _method(owner: str, name: str, documented: str) -> Any:
    @functools.cache
    def signatures() -> list[tuple[inspect.Signature, str]]:
        return [
            (_parse(parameters), result.strip())
            for _, parameters, result in _SIGNATURE.findall(documented)
        ]

    def call(self: Any, *given: Any, **named: Any) -> Any:
        module = self._module
        problems = []
        for signature, result in signatures():
            try:
                bound = signature.bind(self, *given, **named)
                _check_types(module, signature, bound)
            except TypeError as e:
                problems.append(str(e))
                continue
            module.calls.append(f"{owner}.{name}")
            special = _SPECIAL.get((owner, name))
            arguments = list(bound.arguments.values())[1:]
            return special(self, *arguments) if special else _default(module, result)
        raise TypeError(f"{owner}.{name}{given}{named or ''}: {problems}")

    return call


def _parse(parameters: str) -> inspect.Signature:
    made = []
    for text in re.split(r", (?=\w+(?::|$))", parameters):
        found = _PARAMETER.match(text)
        assert found, text
        default = inspect.Parameter.empty if found[3] is None else found[3]
        made.append(
            inspect.Parameter(
                found[1], inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=default, annotation=found[2] or "",
            )
        )  # fmt: skip
    return inspect.Signature(made)


def _check_types(module: Module, signature: inspect.Signature, bound: Any) -> None:
    for name, value in bound.arguments.items():
        wanted = signature.parameters[name].annotation.rpartition(".")[2]
        if name == "self":
            continue
        if wanted in _SCALARS:
            kind: Any = _SCALARS[wanted]
        elif wanted == "Dims":
            kind = (tuple, list)
        else:
            kind = getattr(module, wanted, object)
        if not isinstance(value, kind) or (wanted == "int" and isinstance(value, bool)):
            raise TypeError(f"{name} is {value!r}, not {wanted}")


def _default(module: Module, result: str) -> Any:
    made = getattr(module, result.rpartition(".")[2], None)
    if isinstance(made, type):
        return made.__new__(made)
    return {"bool": True, "int": 0}.get(result)


def _parse_onnx(self: Any, model: bytes, path: str | None = None) -> bool:
    """Read a graph as the parser does: weights lie beside `path`."""
    graph = onnx.load_model_from_string(bytes(model))
    assert path, "external weights need the model's path"
    onnx.external_data_helper.load_external_data_for_model(graph, str(Path(path).parent))
    self._module.parsed = graph
    return True


def _build(self: Any, network: Any, config: Any) -> Any:
    module = self._module
    if not module.is_building_possible:
        return None
    monitor = config.progress_monitor
    monitor.phase_start("Building the engine", None, 4)
    for step in range(4):
        monitor.phase_start("inner", "Building the engine", 2)
        assert monitor.step_complete("inner", 0) is True
        monitor.phase_finish("inner")
        assert monitor.step_complete("Building the engine", step) is True
    monitor.phase_finish("Building the engine")
    return module.IHostMemory(PLAN + module.parsed.SerializeToString())


_SPECIAL = {
    ("OnnxParser", "parse"): _parse_onnx,
    ("Builder", "build_serialized_network"): _build,
    ("IBuilderConfig", "set_timing_cache"): lambda self, cache, ignore: (
        not self._module.refuses_timing_cache or not getattr(cache, "_measured", True)
    ),
    ("ITimingCache", "serialize"): lambda self: self._module.IHostMemory(b"timings"),
}


def install(module: Module) -> None:
    """Make `import tensorrt` give the stand-in."""
    sys.modules["tensorrt"] = module
