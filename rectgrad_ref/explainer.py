"""Model + image + method → attribution: the front door."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from . import analysis
from .attribution import Attribution, Layer
from .errors import InvalidImage, InvalidModel, InvalidTarget, OutOfMemory, RectGradWarning
from .executors import Backend, Runner, make_backend
from .graph import Graph, InputSpec, freeze, input_spec, output_name
from .images import Layout, infer_layout, prepare
from .labels import class_names
from .methods import METHODS, Method, make_method
from .model import Model, ModelSource, read_model
from .plan import Plan, Step, make_plan
from .preprocess import PreprocessLike, resolve_preprocess
from .reference import Observer
from .rules.declared import Rectify

_LAYOUT_AXES = 4
_EXTENT = 224  # of an example, where the file leaves it open

Targets = int | str | Sequence[int | str] | np.ndarray | None


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A plan at one input shape, ready to run."""

    graph: Graph
    plan: Plan
    runner: Runner
    notes: tuple[str, ...]
    chunk: int


class Explainer:
    """A loaded model that explains many images.

    Parameters
    ----------
    onnx_path : path, bytes or onnx.ModelProto
    backend : str
        ``"auto"``, ``"cuda"`` (an NVIDIA GPU, float32), ``"cpu"`` (onnxruntime forward, float32) or
        ``"reference"`` (NumPy throughout).
    dtype : dtype, optional
        float64 or float32 on the reference backend; float64 is its default.
    input, output : str, optional
        Names of the image input and of the class scores, where the model has several.
    preprocess : optional
        How pictures become inputs: see `rectgrad_ref.preprocess.resolve_preprocess`.
    labels : path or sequence of str, optional
        Class names: see `rectgrad_ref.labels.class_names`.
    layout : str, optional
        ``"NCHW"`` or ``"NHWC"`` where the input's shape does not tell.
    threads : int, optional
        Of the forward pass and of the walk back; one per processor by default.
    batch_size : int, optional
        At most so many samples per forward pass; by default as many as take about one gigabyte,
        or half of a GPU's free memory.
    tf32 : bool
        Whether the backend ``"cuda"`` may round what it multiplies to 11 significant bits.

    Raises
    ------
    InvalidModel
        The file cannot be read as an ONNX classifier.
    BackendUnavailable
        The backend is not installed.
    """

    def __init__(
        self,
        onnx_path: ModelSource,
        *,
        backend: str = "auto",
        dtype: Any = None,
        input: str | None = None,
        output: str | None = None,
        preprocess: PreprocessLike | None = None,
        labels: Any = None,
        layout: Layout | None = None,
        threads: int | None = None,
        batch_size: int | None = None,
        tf32: bool = False,
    ) -> None:
        for name, count in (("batch_size", batch_size), ("threads", threads)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.model: Model = read_model(onnx_path)
        self.input: InputSpec = input_spec(self.model, input)
        self._output = output_name(self.model, output)
        self._preprocess, self._labels, self._layout = preprocess, labels, layout
        self._batch_size = batch_size
        self._graphs: dict[tuple[int, ...], Graph] = {}
        self._plans: dict[tuple[tuple[int, ...], Method], _Prepared] = {}
        self._class_names: dict[int, tuple[str, ...] | None] = {}
        self._at_baseline: tuple[np.ndarray, np.ndarray] | None = None
        fixed = self.input.shape[0]
        self._batchable = self._proves_samples()
        if not self._batchable and fixed not in (None, 1):
            raise InvalidModel(
                f"{self.model.name}: its batch is fixed at {fixed} samples, which are not provably "
                "independent; export it with a symbolic batch, or one of 1"
            )
        self.backend: Backend = make_backend(
            backend,
            self.model,
            self.input.name,
            rebatch=fixed is not None and self._batchable,
            dtype=dtype,
            threads=threads,
            tf32=tf32,
        )

    def explain(
        self,
        image: Any,
        *,
        method: str | Method = "rectgrad",
        target: Targets = None,
        preset: str = "default",
        preprocess: PreprocessLike | None = None,
        trace: bool = False,
        keys: Sequence[int] | None = None,
        **options: Any,
    ) -> Attribution:
        """Explain one image or a batch.

        Parameters
        ----------
        image : path, PIL image, numpy.ndarray, or a list of them
            A picture, which is preprocessed; or an array of the model input's shape and axis order
            (the batch axis may be missing) that is preprocessed already: in the model's own units.
        method : str or Method
            An id of `methods()`, or a method with its conventions.
        target : int, str or sequence, optional
            Class index or name, one or one per sample; by default the largest logit of each sample.
        preset : str
            ``"default"``, ``"paper"`` or ``"authors"``.
        preprocess : optional
            As in the constructor, for this call.
        trace : bool
            Keep the layer-wise trace (`Attribution.layers`).
        keys : sequence of int, optional
            Identity of each sample for methods with noise; by default its position in the call.
        **options
            Fields of the method, such as ``q=98.0``.

        Returns
        -------
        Attribution
            Its values have the shape of the model's input, (N, C, H, W) or (N, H, W, C), and the
            unit of the method: gradients are logits per unit of the input, products with the
            input are logits.

        Raises
        ------
        InvalidImage, InvalidTarget
            The image does not fit the model, or has no such class.
        TypeError, ValueError
            An option that the method does not have, or a value out of range.
        UnsupportedOperator
            A node on the path from the input to the logits has no rule.
        """
        chosen = make_method(method, preset, **options)
        if trace and not chosen.walks_once:
            raise ValueError(
                f"{chosen.id} is not one walk back through the layers; it has no layer-wise trace"
            )
        prepared = prepare(
            image,
            self.input.shape,
            self.input.dtype,
            layout=self._layout,
            preprocess=self._known_preprocess if preprocess is None else preprocess,
            metadata=self.model.metadata,
            model_path=self.model.path,
        )
        x = prepared.array.astype(self.backend.forward.dtype, copy=False)
        run = _Run(self, x, chosen, _sample_keys(keys, len(x)), target)
        for note in run.notes:
            warnings.warn(note, RectGradWarning, stacklevel=2)
        values, layers = run.attribute(trace)
        return Attribution(
            values=values,
            inputs=x,
            logits=run.logits,
            target=run.target,
            method=chosen,
            layout=prepared.layout,
            environment=self.environment,
            head=run.head,
            class_names=run.names,
            preprocess=prepared.preprocess,
            notes=run.notes,
            completeness_gap=run.gap(values),
            trace=layers,
        )

    __call__ = explain

    def plan(
        self, method: str | Method = "rectgrad", *, preset: str = "default", **options: Any
    ) -> PlanListing:
        """What an explanation will do: one row a backward step; `print` shows a table.

        An input of symbolic height and width is planned for at the size of the last image, at first
        for 224 × 224.

        Raises
        ------
        UnsupportedOperator
            A node on the path from the input to the logits has no rule.
        """
        chosen = make_method(method, preset, **options)
        prepared = self._prepare(self._example_shape(), chosen)
        return PlanListing(prepared.plan, self.backend, prepared.notes)

    @property
    def graph(self) -> Graph:
        """The frozen graph for one image, of the size that `plan` takes."""
        return self._graph(self._example_shape())

    @property
    def layout(self) -> Layout | None:
        """The input's axis order, or None where its shape does not tell."""
        if self._layout is not None or len(self.input.shape) != _LAYOUT_AXES:
            return self._layout
        try:
            return infer_layout(self.input.shape)
        except ValueError:
            return None

    @cached_property
    def environment(self) -> dict[str, Any]:
        """What it takes to reproduce a result."""
        from . import __version__

        return {
            "model": self.model.name,
            "sha256": self.model.sha256,
            "backend": self.backend.name,
            "forward": self.backend.forward.description,
            "dtype": self.backend.forward.dtype.name,
            "versions": {
                "rectgrad_ref": __version__,
                "numpy": np.__version__,
                "onnx": onnx.__version__,
                "python": platform.python_version(),
            },
        }

    def class_names(self, count: int) -> tuple[str, ...] | None:
        """Class names from the label file or the model's metadata."""
        if count not in self._class_names:
            names = class_names(count, self._labels, metadata=self.model.metadata)
            self._class_names[count] = names
        return self._class_names[count]

    @cached_property
    def _known_preprocess(self) -> PreprocessLike | None:
        """Found once, as it may lie in files; what is unknown or wrong matters only to pictures."""
        try:
            return resolve_preprocess(
                self._preprocess, metadata=self.model.metadata, model_path=self.model.path
            )
        except InvalidImage:
            return self._preprocess

    def _chunk(self, graph: Graph, runner: Runner) -> int:
        """Samples per forward pass."""
        if not self._batchable:
            return 1
        if self._batch_size is not None:
            return self._batch_size
        shapes = (graph.shapes[v] for v in runner.keeps)
        units = sum(int(np.prod(shape)) for shape in shapes if shape is not None) / graph.batch
        bytes_per_sample = units * self.backend.forward.dtype.itemsize * 4
        return max(1, int(self.backend.chunk_bytes / max(bytes_per_sample, 1)))

    def _prepare(self, shape: tuple[int, ...], method: Method) -> _Prepared:
        key = (shape, method)
        if key not in self._plans:
            graph = self._graph(shape)
            straight_through = method.quantization == "straight_through"
            plan = make_plan(graph, method.rules(graph), straight_through=straight_through)
            runner = self.backend.runner(plan)
            notes, chunk = tuple(method.notes(graph)), self._chunk(graph, runner)
            self._plans[key] = _Prepared(graph, plan, runner, notes, chunk)
        return self._plans[key]

    def _graph(self, shape: tuple[int, ...]) -> Graph:
        if shape not in self._graphs:
            self._graphs[shape] = freeze(
                self.model, shape, input=self.input.name, output=self._output
            )
        return self._graphs[shape]

    def _example_shape(self, batch: int = 1) -> tuple[int, ...]:
        if self._graphs:
            return (batch, *next(reversed(self._graphs))[1:])
        return (batch, *(_EXTENT if n is None else n for n in self.input.shape[1:]))

    def _proves_samples(self) -> bool:
        """Whether a batch of two provably gives each sample what it would get alone."""
        shape = self._example_shape(batch=2)
        try:
            graph = freeze(self.model, shape, input=self.input.name, output=self._output)
            return analysis.is_samplewise(graph)
        except InvalidModel:
            return False


class _Run:
    """One call of `Explainer.explain`: everything about these images and this method."""

    def __init__(
        self, explainer: Explainer, x: np.ndarray, method: Method, keys: np.ndarray, target: Targets
    ) -> None:
        self.explainer, self.x, self.method, self.keys = explainer, x, method, keys
        self.forward = explainer.backend.forward
        self.baseline = method.reference_input(x)
        first = self._prepared(1)
        self.head = first.graph.head
        self.chunk = first.chunk
        self.notes = self._prepared(min(self.chunk, max(len(x), 1))).notes
        self.names = explainer.class_names(first.graph.classes)
        if method.whole_batch and len(x) > self.chunk and method.walks_once:
            raise ValueError(
                f"{method.id}: this convention is over the whole batch, but {len(x)} samples do "
                f"not fit one pass of {self.chunk}; give fewer, or another scope"
            )
        self._given = resolve_targets(target, len(x), first.graph.classes, self.names)
        once = method.walks_once
        self.logits = np.zeros((0, first.graph.classes)) if once else self._scores(x)
        self.target = self._choose(self.logits, slice(None))

    def attribute(self, trace: bool) -> tuple[np.ndarray, Mapping[str, Layer] | None]:
        """The maps, and the layer-wise trace if asked for; in chunks that the memory holds."""
        while True:
            try:
                return self._attribute(trace)
            except OutOfMemory:
                self.chunk = min(self.chunk, len(self.x)) // 2
                if not self.chunk or (self.method.whole_batch and self.method.walks_once):
                    raise

    def _attribute(self, trace: bool) -> tuple[np.ndarray, Mapping[str, Layer] | None]:
        traces: list[dict[str, Layer]] = []
        if self.method.walks_once:
            R = self._one_pass(traces if trace else None)
        else:
            R = self._many_passes()
        values = self.method.finish(self.x, R, self.keys)
        return np.ascontiguousarray(values), _joined(traces) if trace else None

    def gap(self, values: np.ndarray) -> np.ndarray | None:
        """Σ values − (S(x) − S(x₀))."""
        if self.baseline is None:
            return None
        same = (self.baseline == self.baseline[:1]).all()
        there = self._scores_at(self.baseline[:1]) if same else self._scores(self.baseline)
        there = np.broadcast_to(there, self.logits.shape)
        rows = np.arange(len(self.x))
        difference = self.logits[rows, self.target] - there[rows, self.target]
        return np.asarray(values.reshape(len(self.x), -1).sum(axis=1) - difference)

    def _scores_at(self, baseline: np.ndarray) -> np.ndarray:
        """Of one sample, which the next call's baseline mostly is too."""
        known = self.explainer._at_baseline
        if known is None or not np.array_equal(known[0], baseline):
            known = baseline.copy(), self._scores(baseline)
            self.explainer._at_baseline = known
        return known[1]

    def _one_pass(self, traces: list[dict[str, Layer]] | None) -> np.ndarray:
        """Target and gradient from the same forward pass."""
        logits, gradients = [], []
        for rows in self._chunks(len(self.x)):
            layers: dict[str, Layer] | None = None if traces is None else {}
            scores, R = self._gradient(self.x[rows], None, rows, layers)
            logits.append(scores)
            gradients.append(R)
            if traces is not None and layers is not None:
                traces.append(layers)
        if logits:
            self.logits = np.concatenate(logits)
            self.target = self._choose(self.logits, slice(None))
        gradients = gradients or [np.zeros_like(self.x)]
        return gradients[0] if len(gradients) == 1 else np.concatenate(gradients)

    def _many_passes(self) -> np.ndarray:
        """Σₖ weight(k) · gradient at point(k), several points to a forward pass."""
        total = np.zeros_like(self.x)
        together = max(1, self.chunk // max(len(self.x), 1))
        for start in range(0, self.method.passes, together):
            ks = range(start, min(start + together, self.method.passes))
            points = np.concatenate([self.method.point(self.x, k, self.keys) for k in ks])
            owner = np.tile(np.arange(len(self.x)), len(ks))
            parts = [
                self._gradient(points[rows], self.target[owner[rows]], rows)[1]
                for rows in self._chunks(len(points))
            ]
            R = np.concatenate(parts).reshape(len(ks), *self.x.shape)
            for k, part in zip(ks, R, strict=True):
                total += self.x.dtype.type(self.method.weight(k)) * part
        return total

    def _gradient(
        self,
        x: np.ndarray,
        target: np.ndarray | None,
        rows: slice,
        layers: dict[str, Layer] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores (n, classes) and R at the input, for one chunk."""
        prepared = self._prepared(len(x))

        def seed_of(scores: np.ndarray) -> np.ndarray:
            chosen = self._choose(scores, rows) if target is None else target
            return seed_at(scores, chosen, self.method.output_seed)

        return prepared.runner(
            x,
            seed_of,
            baseline=None if self.baseline is None else self.baseline[rows],
            observe=None if layers is None else _recorder(layers, prepared.graph.batch),
        )

    def _scores(self, x: np.ndarray) -> np.ndarray:
        parts = []
        for rows in self._chunks(len(x)):
            graph = self._prepared(len(x[rows])).graph
            parts.append(self.forward(graph, x[rows], (graph.logits,))[graph.logits])
        classes = self._prepared(1).graph.classes
        return np.concatenate([p.reshape(-1, classes) for p in parts] or [np.zeros((0, classes))])

    def _prepared(self, batch: int) -> _Prepared:
        return self.explainer._prepare((batch, *self.x.shape[1:]), self.method)

    def _chunks(self, n: int) -> Iterator[slice]:
        """Of nearly the same size: a small last one would be slow, and need a plan of its own."""
        size = -(-n // -(-n // self.chunk)) if n else 1
        for start in range(0, n, size):
            yield slice(start, min(start + size, n))

    def _choose(self, scores: np.ndarray, rows: slice) -> np.ndarray:
        if self._given is not None:
            return self._given[rows]
        return scores.argmax(axis=1) if len(scores) else np.zeros(0, np.int64)


def seed_at(scores: np.ndarray, target: np.ndarray, kind: str) -> np.ndarray:
    """What enters at the logits, shape (N, classes)."""
    rows = np.arange(len(scores))
    seed = np.zeros_like(scores)
    if kind == "softmax":
        e = np.exp(scores - scores.max(axis=1, keepdims=True))
        probability = e / e.sum(axis=1, keepdims=True)
        chosen = probability[rows, target][:, None]
        seed = -chosen * probability
        seed[rows, target] += chosen[:, 0]
        return seed
    seed[rows, target] = scores[rows, target] if kind == "logit" else 1
    return seed


def _sample_keys(keys: Sequence[int] | None, samples: int) -> np.ndarray:
    if keys is None:
        return np.arange(samples)
    array = np.asarray(keys)
    if array.shape != (samples,) or array.dtype.kind not in "iu" or array.min() < 0:
        raise ValueError(f"keys must be one non-negative integer a sample, got {keys!r}")
    return array


def resolve_targets(
    target: Targets, samples: int, classes: int, names: Sequence[str] | None
) -> np.ndarray | None:
    """A class index for each sample; None for the predicted classes.

    Raises
    ------
    InvalidTarget
        There is no such class, or another number of them than of samples.
    """
    if target is None:
        return None
    one = isinstance(target, str) or not np.iterable(target)
    items: list[Any] = [target] * samples if one else list(target)  # type: ignore[arg-type]
    if len(items) != samples:
        raise InvalidTarget(f"{len(items)} targets for {samples} samples")
    return np.array([_class_index(item, classes, names) for item in items], np.int64)


def _class_index(item: Any, classes: int, names: Sequence[str] | None) -> int:
    if isinstance(item, str):
        if names is None or item not in names:
            known = "the model has no class names" if names is None else f"as in {names[0]!r}"
            raise InvalidTarget(f"unknown class {item!r} ({known}); give its index")
        return names.index(item)
    if isinstance(item, (bool, np.bool_)) or not isinstance(item, (int, np.integer)):
        raise InvalidTarget(f"a target must be a class index or name, got {item!r}")
    if not 0 <= item < classes:
        raise InvalidTarget(
            f"class {item} does not exist; the model has classes 0 to {classes - 1}"
        )
    return int(item)


def _recorder(layers: dict[str, Layer], samples: int) -> Observer:
    """An observer that fills `layers`, from the logits back."""

    def observe(step: Step, a: np.ndarray, R_out: np.ndarray, R_in: np.ndarray) -> None:
        tau = mask = None
        if isinstance(step.rule, Rectify):
            mask, tau = step.rule.select(a, R_out, samples)
        layers[step.node.outputs[0]] = Layer(a, R_out, R_in, tau, mask)

    return observe


def _joined(traces: list[dict[str, Layer]]) -> dict[str, Layer]:
    """Chunks put together, from the input to the logits."""
    if not traces:
        return {}
    result = {}
    for name in reversed(traces[0]):
        parts = [trace[name] for trace in traces]
        a, R_out, R_in = (
            np.concatenate([getattr(part, key) for part in parts]) for key in ("a", "R_out", "R_in")
        )
        tau, mask = (
            _joined_optional([getattr(part, key) for part in parts]) for key in ("tau", "mask")
        )
        result[name] = Layer(a, R_out, R_in, tau, mask)
    return result


def _joined_optional(parts: list[np.ndarray | None]) -> np.ndarray | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None


@dataclass(frozen=True, eq=False)
class PlanListing:
    """A plan to look at: iterate over its rows, or print it.

    Attributes
    ----------
    plan : Plan
    backend : Backend
    notes : tuple of str
        What the method warns of on this model.
    """

    plan: Plan
    backend: Backend
    notes: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One dict a backward step, from the logits to the input; rules with all parameters."""
        runs_as = self.backend.runs_as(self.plan)
        return [
            {
                "node": step.node.name,
                "op": step.node.op,
                "rule": repr(step.rule),
                "reads": list(step.reads),
                "writes": list(step.writes),
                "backend": runs_as[step.node.name],
            }
            for step in self.plan.steps
        ]

    def __str__(self) -> str:
        runs_as = self.backend.runs_as(self.plan)
        rows = [
            (s.node.op, s.node.name, str(s.rule), runs_as[s.node.name]) for s in self.plan.steps
        ]
        table = [("op", "node", "rule", "backend"), *rows]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in table]
        return "\n".join(line.rstrip() for line in (*lines, *self.notes))


def explain(
    onnx_path: ModelSource,
    image: Any,
    *,
    method: str | Method = "rectgrad",
    target: Targets = None,
    preset: str = "default",
    preprocess: PreprocessLike | None = None,
    backend: str = "auto",
    dtype: Any = None,
    trace: bool = False,
    input: str | None = None,
    output: str | None = None,
    labels: Any = None,
    layout: Layout | None = None,
    **options: Any,
) -> Attribution:
    """Explain a class score of an ONNX classifier.

    Parameters and errors are those of `Explainer` and `Explainer.explain`. An `Explainer` keeps the
    loaded model for many calls.

    Returns
    -------
    Attribution

    Examples
    --------
    >>> explain("model.onnx", "cat.jpg", preprocess="imagenet").save("cat.png")  # doctest: +SKIP
    """
    loaded = Explainer(
        onnx_path,
        backend=backend,
        dtype=dtype,
        input=input,
        output=output,
        preprocess=preprocess,
        labels=labels,
        layout=layout,
    )
    return loaded.explain(
        image, method=method, target=target, preset=preset, trace=trace, **options
    )


def methods() -> dict[str, str]:
    """Ids of all methods, with what each is and its source."""
    return {name: (cls.__doc__ or "").partition("\n")[0] for name, cls in METHODS.items()}
