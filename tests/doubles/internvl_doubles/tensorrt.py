"""A stand-in for the `tensorrt` module whose every call binds to the real signatures.

The signatures are read from the docstrings of the published binding
(`tensorrt_cu12_bindings` 10.14.1.48.post1), which imports without TensorRT over
three stub libraries. Nothing is compiled: a plan is the ONNX graph with its
weights embedded, and running it is onnxruntime in float32 on the CPU.
"""

import ctypes
import functools
import importlib
import importlib.machinery
import inspect
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime

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
    "IOptimizationProfile", "ITimingCache", "IProgressMonitor", "IHostMemory", "Runtime",
    "ICudaEngine", "IExecutionContext",
)  # fmt: skip
_ENUMS = (
    "NetworkDefinitionCreationFlag", "BuilderFlag", "MemoryPoolType", "DataType", "TensorIOMode",
)  # fmt: skip
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
        # Who looks for the package, as transformers does, wants one.
        self.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
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
        elif isinstance(found, property):
            body[member] = None
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
    profile = json.dumps(config._profile._shapes).encode()
    graph = module.parsed.SerializeToString()
    return module.IHostMemory(PLAN + len(profile).to_bytes(8, "little") + profile + graph)


def _set_shape(self: Any, tensor: str, *shapes: Any) -> None:
    object.__setattr__(self, "_shapes", {tensor: [list(shape) for shape in shapes]})


def _add_profile(self: Any, profile: Any) -> int:
    object.__setattr__(self, "_profile", profile)
    return 0


def _deserialize(self: Any, serialized: bytes) -> Any:
    module = self._module
    if not serialized.startswith(PLAN):
        return None
    rest = serialized[len(PLAN) :]
    length = int.from_bytes(rest[:8], "little")
    engine = module.ICudaEngine.__new__(module.ICudaEngine)
    graph = onnx.load_model_from_string(rest[8 + length :])
    for name, value in (
        ("_profile", json.loads(rest[8 : 8 + length])), ("_graph", graph),
        ("_names", [graph.graph.input[0].name, graph.graph.output[0].name]),
        ("num_io_tensors", 2),
    ):  # fmt: skip
        object.__setattr__(engine, name, value)
    return engine


def _get_mode(self: Any, name: str) -> Any:
    modes = self._module.TensorIOMode
    return (modes.INPUT, modes.OUTPUT)[self._names.index(name)]


def _create_context(self: Any, *_: Any) -> Any:
    context = self._module.IExecutionContext.__new__(self._module.IExecutionContext)
    session = onnxruntime.InferenceSession(
        _in_float32(self._graph).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    dtype = _DTYPES[self._graph.graph.input[0].type.tensor_type.elem_type]
    for name, value in (
        ("_engine", self), ("_session", session), ("_addresses", {}), ("_dtype", dtype),
        ("_shape", None),
    ):  # fmt: skip
        object.__setattr__(context, name, value)
    return context


def _in_float32(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph whose every number is float32: no CPU has products of bfloat16."""
    wide = onnx.ModelProto()
    wide.CopyFrom(graph)
    for tensor in wide.graph.initializer:
        if tensor.data_type in _DTYPES:
            values = np.asarray(onnx.numpy_helper.to_array(tensor)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for node in wide.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i in _DTYPES:
                attribute.i = onnx.TensorProto.FLOAT
    for value in (*wide.graph.input, *wide.graph.output, *wide.graph.value_info):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return wide


def _set_input_shape(self: Any, name: str, shape: tuple[int, ...]) -> bool:
    least, _, most = self._engine._profile[name]
    fits = all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
    object.__setattr__(self, "_shape", tuple(shape) if fits else None)
    return fits


def _set_address(self: Any, name: str, memory: int) -> bool:
    self._addresses[name] = memory
    return name in self._engine._names and memory != 0


def _execute(self: Any, stream: int) -> bool:
    assert stream == 0, "there is no GPU"
    if self._shape is None or len(self._addresses) != 2:
        return False
    given, made = self._engine._names
    size = int(np.prod(self._shape)) * self._dtype.itemsize
    pixels = np.frombuffer(ctypes.string_at(self._addresses[given], size), self._dtype)
    (features,) = self._session.run([made], {given: pixels.reshape(self._shape).astype(np.float32)})
    content = np.ascontiguousarray(features, dtype=self._dtype).tobytes()
    ctypes.memmove(self._addresses[made], content, len(content))
    return True


_DTYPES = {
    onnx.TensorProto.FLOAT: np.dtype(np.float32),
    onnx.TensorProto.FLOAT16: np.dtype(np.float16),
    onnx.TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


_SPECIAL = {
    ("OnnxParser", "parse"): _parse_onnx,
    ("Builder", "build_serialized_network"): _build,
    ("IBuilderConfig", "set_timing_cache"): lambda self, cache, ignore: (
        not self._module.refuses_timing_cache or not getattr(cache, "_measured", True)
    ),
    ("IOptimizationProfile", "set_shape"): _set_shape,
    ("IBuilderConfig", "add_optimization_profile"): _add_profile,
    ("Runtime", "deserialize_cuda_engine"): _deserialize,
    ("ICudaEngine", "get_tensor_name"): lambda self, index: self._names[index],
    ("ICudaEngine", "get_tensor_mode"): _get_mode,
    ("ICudaEngine", "get_tensor_profile_shape"): lambda self, name, index: [
        tuple(shape) for shape in [self._profile][index][name]
    ],
    ("ICudaEngine", "create_execution_context"): _create_context,
    ("IExecutionContext", "set_input_shape"): _set_input_shape,
    ("IExecutionContext", "infer_shapes"): lambda self: [],
    ("IExecutionContext", "set_tensor_address"): _set_address,
    ("IExecutionContext", "execute_async_v3"): _execute,
    ("ITimingCache", "serialize"): lambda self: self._module.IHostMemory(b"timings"),
}


def install(module: Module) -> None:
    """Make `import tensorrt` give the stand-in."""
    sys.modules["tensorrt"] = module
