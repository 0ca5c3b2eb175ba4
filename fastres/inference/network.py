"""``fastres.compile``: a network in evaluation mode as an object that runs plans."""

import threading
from collections import OrderedDict
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from fastres import _library
from fastres.errors import CompileError, InputError

from .building import Builder, Built, Options
from .folding import Layer
from .fusing import fuse_steps
from .graph import Constant, Graph, leaves_in
from .recording import record
from .watching import Structure, Values, hooked, snapshot

_DTYPES = (torch.float32, torch.bfloat16)
_MOST_PLANS = 8
_CHECKED_IMAGES = 2
# Largest difference, relative to the network's own result in the L2 norm, that rounding can explain.
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.2}
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")


def check_network(model: nn.Module, own_hooks: bool = True) -> torch.dtype:
    """The dtype of a network that a plan may be made of.

    Raises:
        CompileError: whatever about the network itself rules that out.
    """
    if _library.native_error() is not None:
        raise CompileError(f"inference plans need the native library: {_library.native_error()}")
    if not hasattr(_library._native, "Plan"):
        raise CompileError("the native library is older than these Python sources; build it again")
    name = type(model).__name__
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise CompileError(f"compile() takes a torch.nn.Module with a Python forward, got {name}")
    if name in _WRAPPERS and type(model).__module__.startswith("torch."):
        raise CompileError(f"the network is wrapped in {name}; compile the network inside")
    if model.training:
        raise CompileError(f"this {name} is in training mode; a plan is for evaluation: call model.eval() first")
    for path, module in model.named_modules():
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise CompileError(f"layer {path!r} is in training mode; a plan is for evaluation: call model.eval() first")
    where = hooked(model, own_hooks)
    if where is not None:
        raise CompileError(f"a plan would not call the forward hooks of {where}; remove them first")
    floating = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    for t in floating:
        if t.device.type != "cpu":
            raise CompileError(f"a plan runs on the CPU, but {name} has parameters on {t.device}")
    dtype = floating[0].dtype if floating else torch.float32
    if dtype not in _DTYPES:
        raise CompileError(f"a plan is in float32 or bfloat16, but {name} is in {str(dtype).removeprefix('torch.')}")
    return dtype


class State:
    """Recordings, packed weights and plans, all of the same weights. Thrown away when anything changes."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, options: Options) -> None:
        self.model, self.dtype, self.options = ref(model), dtype, options
        self.plan_dtype = options.dtype or dtype
        self.graphs: dict[tuple[int, ...], Graph] = {}
        self.outputs: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.plans: OrderedDict[tuple[int, ...], Built] = OrderedDict()
        self.layers: dict[Any, Layer] = {}
        self.trial: tuple[int, ...] | None = None  # the plan that was only made for comparing
        self.structure: Structure
        self.values: Values

    def record(self, x: Tensor) -> None:
        """Records the network for images of this size, and compares the plan with what the network gives."""
        model = self.model()
        assert model is not None
        sample = x[:_CHECKED_IMAGES]
        if len(x) == 0:
            generator = torch.Generator().manual_seed(0)
            sample = torch.randn((1, *x.shape[1:]), generator=generator).to(self.dtype)
        graph, expected = record(model, sample)
        graph = fuse_steps(graph)
        size = tuple(x.shape[1:])
        self.graphs[size] = graph
        try:
            built = self.build((len(sample), *size))
            self._compare(execute(built, sample), expected)
        except BaseException:
            del self.graphs[size]
            raise
        self.trial = (len(sample), *size)
        leaves = (
            leaf
            for g in self.graphs.values()
            for n in g.nodes
            for c in leaves_in(n.facts, Constant)
            for leaf in c.leaves()
        )
        self.structure, self.values = snapshot(model, leaves)

    def _compare(self, got: Tensor, expected: Tensor) -> None:
        if got.shape != expected.shape:
            raise CompileError(f"the plan gives {list(got.shape)}, the network {list(expected.shape)}")
        finite = expected.isfinite() & got.isfinite()
        a, b = got[finite].double(), expected[finite].double()
        difference = (a - b).norm().item() / max(b.norm().item(), 1e-30)
        if difference > _TOLERANCE[self.plan_dtype] or not torch.equal(got.isnan(), expected.isnan()):
            raise CompileError(
                f"the plan gives other results than the network on the example (relative difference {difference:.2g}): its "
                "forward depends on something that a recording can't hold, such as a value or a random number"
            )

    def build(self, shape: tuple[int, ...]) -> Built:
        """The plan for this [N, C, H, W], from the cache or new."""
        if shape not in self.plans:
            graph = self.graphs[shape[1:]]
            built = Builder(graph, shape[0], self.plan_dtype, self.options, self.layers).build()
            self.outputs[shape[1:]] = built.output
            self.plans[shape] = built
            if self.trial is not None:
                self.plans.pop(self.trial, None)
            while len(self.plans) > _MOST_PLANS:
                self.plans.popitem(last=False)
            self._drop_unused_weights()
            self.trial = None
        elif shape == self.trial:
            self.trial = None
        self.plans.move_to_end(shape)
        return self.plans[shape]

    def _drop_unused_weights(self) -> None:
        used = {pair for built in self.plans.values() for pair in built.layers}
        for key, layer in self.layers.items():
            layer.packed = {k: v for k, v in layer.packed.items() if (key, k) in used}


def execute(built: Built, x: Tensor) -> Tensor:
    """The plan's result for ``x``, a new tensor of its dtype."""
    given, x = x.dtype, x.to(built.dtype)
    sizes = (built.images, *built.output)
    y = torch.empty(
        sizes, dtype=x.dtype, memory_format=torch.channels_last if len(sizes) == 4 else torch.contiguous_format
    )
    built.plan.run(x.data_ptr(), x.stride(), y.data_ptr())
    y = y.to(given)
    return y.flatten(1) if built.flat else y


class Engine:
    """Plans of one network, which it does not keep alive."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, options: Options, own_hooks: bool) -> None:
        self._model, self.dtype, self._options, self._own_hooks = ref(model), dtype, options, own_hooks
        self._lock = threading.RLock()
        self._state: State | None = None

    def fresh(self) -> bool:
        """Whether what was recorded still is what the network would compute."""
        state = self._state
        return state is not None and not state.structure.changed() and not state.values.changed()

    def plan(self, x: Tensor, checked: bool = False) -> Built:
        """The plan for ``x``, [N, C, H, W] with N > 0; recorded and built where that is needed.

        ``checked``: ``fresh`` was just asked.
        """
        with self._lock:
            if not checked and not self.fresh():
                self._state = None
            if self._state is None or tuple(x.shape[1:]) not in self._state.graphs:
                model = self._model()
                if model is None:
                    raise CompileError("the network that this plan was made from no longer exists")
                if check_network(model, self._own_hooks) != self.dtype:
                    raise CompileError(f"the network was {self.dtype} when it was compiled; compile it again")
                state = self._state or State(model, self.dtype, self._options)
                state.record(x)
                self._state = state
            return self._state.build(tuple(x.shape))

    def empty(self, x: Tensor) -> Tensor:
        """The result for no images."""
        with self._lock:
            one = torch.empty((1, *x.shape[1:]), dtype=x.dtype)
            if self._state is None or tuple(x.shape[1:]) not in self._state.graphs or not self.fresh():
                self.plan(torch.randn(one.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype))
            assert self._state is not None
            y = torch.empty((0, *self._state.outputs[tuple(x.shape[1:])]), dtype=x.dtype)
            return y.flatten(1) if self.plan(one).flat else y

    def __call__(self, x: Tensor, checked: bool = False) -> Tensor:
        return execute(self.plan(x, checked), x) if len(x) else self.empty(x)

    @property
    def state(self) -> State:
        assert self._state is not None
        return self._state


class CompiledNetwork:
    """A network as plans that run in C++; made by :func:`fastres.compile`.

    Called with [N, C, H, W] of the network's dtype, in any memory format, it returns a new tensor that needs no gradient.
    Plans for other batch and image sizes are made when they are first seen, the last 8 are kept, and all share their
    weights. When the network's parameters, buffers or modules change, the next call makes plans of what they are then.
    Several threads may call it at once.
    """

    def __init__(self, model: nn.Module, example: Tensor, options: Options) -> None:
        dtype = check_network(model)
        self._name, self._model = type(model).__name__, model
        self._channels: int | None = None
        self._engine = Engine(model, dtype, options, own_hooks=True)
        self._check(example)
        self._channels = example.shape[1]
        self._example = tuple(example.shape)
        self._engine(example)

    def _check(self, x: Any) -> None:
        dtype = self._engine.dtype
        channels = "C" if self._channels is None else self._channels
        wanted = f"{self._name}'s plan takes [N, {channels}, H, W] in {_text(dtype)} on the CPU"
        if not isinstance(x, Tensor):
            raise InputError(f"{wanted}, got {type(x).__name__}")
        if x.dim() != 4 or self._channels not in (None, x.shape[1]) or 0 in x.shape[1:]:
            raise InputError(f"{wanted}, got the shape {list(x.shape)}")
        if x.dtype != dtype or x.device.type != "cpu" or x.layout != torch.strided:
            raise InputError(f"{wanted}, got {_text(x.dtype)} on {x.device}")

    def __call__(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> what the network gives, without gradients.

        Raises:
            InputError: wrong shape, dtype or device. CompileError: the network changed into one that can't be compiled.
            MemoryError: no memory for the activations; the plan stays usable.
        """
        self._check(x)
        return self._engine(x)

    def steps(self, x: Tensor | None = None) -> list[dict[str, Any]]:
        """What the plan for ``x`` (default: the example) does, step by step in the order of execution.

        Each has ``name``, ``op``, ``kernel`` (convolutions), ``input`` and ``output`` (C, H, W), ``flops``,
        ``activation_bytes`` (read and written), ``weight_bytes``, ``by_image``, ``relu``, ``residual``; convolutions also
        ``problem`` (its name in :mod:`fastres.tuning`) and ``candidates`` (the kernels that serve it).
        """
        built = self._built(x)
        return [_described(built, {k: v for k, v in step.items() if k != "seconds"}) for step in built.plan.steps()]

    def profile(self, x: Tensor | None = None, repeats: int = 20) -> list[dict[str, Any]]:
        """As :meth:`steps`, with the median ``seconds`` of each step run on all images by all threads."""
        x = torch.zeros(self._example, dtype=self._engine.dtype) if x is None else x
        built = self._built(x)
        x = x.to(built.dtype)
        y = torch.empty((built.images, *built.output), dtype=x.dtype)
        return [_described(built, step) for step in built.plan.profile(x.data_ptr(), x.stride(), y.data_ptr(), repeats)]

    def memory(self) -> dict[str, Any]:
        """Bytes of ``weights`` (packed, shared by all plans), and for each plan's shape the ``arena`` of one call and
        what its ``arenas`` (one for each call at one time) hold."""
        state = self._engine.state
        packed = [w.bytes for layer in state.layers.values() for w in layer.packed.values()]
        plans = {
            shape: {"arena": b.plan.arena_bytes, "arenas": b.plan.arenas, "held": b.plan.arenas_bytes}
            for shape, b in state.plans.items()
        }
        return {"weights": sum(packed), "plans": plans}

    def _built(self, x: Tensor | None) -> Built:
        if x is None:
            x = torch.zeros((max(self._example[0], 1), *self._example[1:]), dtype=self._engine.dtype)
        self._check(x)
        if not len(x):
            raise InputError("a plan for no images has no steps")
        return self._engine.plan(x)

    def __repr__(self) -> str:
        report = self.memory()
        shapes = ", ".join("x".join(map(str, shape)) for shape in report["plans"])
        arena = max((p["arena"] for p in report["plans"].values()), default=0)
        return (
            f"CompiledNetwork({self._name}, {_text(self._engine.state.plan_dtype)}, plans for {shapes}; weights "
            f"{report['weights'] / 2**20:.1f} MiB, largest arena {arena / 2**20:.1f} MiB)"
        )


def _described(built: Built, step: dict[str, Any]) -> dict[str, Any]:
    problem, candidates = built.problems.get(step["name"], (None, ()))
    return {**step, "problem": problem, "candidates": candidates} if step["op"] in ("conv", "linear") else step


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compile(
    model: nn.Module,
    example: Tensor,
    *,
    depth_first_bytes: int | None = None,
    images_per_turn: int = 1,
    arena_limit: int | None = None,
    kernels: dict[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> CompiledNetwork:
    """Plans ``model`` for inputs like ``example``: BatchNorm folded, weights packed, one call into C++ for all layers.

    The network is run once on up to two images of ``example`` and recorded; the plan's result is compared with its own.

    Args:
        model: of fastres, from :func:`fastres.fuse`, torchvision, timm or your own; in evaluation mode, on the CPU, in
            float32 or bfloat16. It must stay alive only as long as the result, which refers to it.
        example: [N, C, H, W]; a plan for its shape is ready when this returns.
        depth_first_bytes: leading layers run image by image while their packed weights are at most this large; 0 runs
            every layer on all images at once. images_per_turn: images that a thread takes at a time there.
        arena_limit: bytes of activations that one call may need; more raises MemoryError.
        kernels: convolution kernels by layer name, for tuning; the others take the preferred one.
        dtype: computes a float32 network in bfloat16 where that is given: weights are folded in float64 and rounded once,
            more exactly than ``model.bfloat16()`` can; inputs and results stay float32.

    Raises:
        CompileError: training mode, hooks, a layer no step exists for, other results; the message says what to do.
        InputError: an example of a wrong shape, dtype or device. MemoryError: no memory for the activations.
    """
    options = Options(depth_first_bytes, images_per_turn, arena_limit, tuple((kernels or {}).items()), dtype)
    if dtype not in (None, *_DTYPES):
        raise CompileError(f"a plan is in float32 or bfloat16, not in {_text(dtype)}")
    if images_per_turn < 1:
        raise InputError(f"images_per_turn must be at least 1, got {images_per_turn}")
    return CompiledNetwork(model, example, options)
