"""Separating with an exported bundle on the device: NumPy and one of onnxruntime, tensorrt or tensorrt_rtx, no torch.

from avsep_runtime import BundleSeparator  # of the bundle's wheel; avsep.export.runtime is the same

separator = BundleSeparator.load("bundle", provider="cpu")
sources = separator.separate(mixture, {"flute": {"object": ..., "motion": ...}, ...}, ["flute", "piano"])
duet = separator.separate(mixture, {"left": ..., "right": ...}, ["left=violin", "right=violin"])

stream = separator.stream(["flute", "piano"], features)
for block in blocks:
    play(stream.push(block))
play(stream.flush())
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .calls import GraphCall
from .chunking import LongStream, context_in_samples, default_crossfade, separate_long
from .engines import engines_folder
from .errors import AudioError, ConfigError, DataError, NumericalError, UnknownNameError
from .manifest import PRESENCE
from .reader import Bundle, Graph, open_bundle
from .recordings import (
    PresenceOfChunks,
    Separated,
    Source,
    by_name,
    check_moves,
    check_told_apart,
    listed,
    nothing_of,
    sources_of,
)
from .sessions import Engine, open_session
from .streaming import FrameStream, StreamLayout, layout_of
from .timeline import VisualSource, VisualTimeline
from .wav import check_samples

__all__ = ["BundleSeparator", "Stream"]

Array = NDArray[Any]
Audio = NDArray[np.float32]
# Called with the middle of a chunk and its length, in seconds of the recording; gives what is seen there.
Sight = Callable[[float, float], Any]
Features = Mapping[str, "VisualTimeline | Mapping[str, Any]"]

_MOST_ENCODED = 256  # results of visual encoders that are remembered


class BundleSeparator:
    """A bundle's separator. Made by :meth:`load`.

    Buffers are kept between calls and used again: threads and streams may share a separator, and wait for each other
    chunk by chunk.

    Attributes:
        provider: what really runs, as its own library names it.
        calls: how often its graph has run.
        causal: it goes frame by frame, and its streams come out within :attr:`latency_samples`, a fraction of a second.
        by_name: sources are to be asked for by name alone, also of a video, unless whoever asks says to look.
        passed_over: for each way that ``provider="auto"`` passed over, the reason in a line.
        unused_engines: those of them for which an engine was built.
        context_samples: of each side of a chunk that are thrown away.
        classes: names of the classes it can separate.
        sample_rate_hz: of the audio it takes and gives.
        clip_samples: of a chunk.
        precision: of the graph.
        channels: that the graph was exported for. A mono mixture goes into any graph.
        can_go_unseen: whether classes may be asked for without features.
        tells_presence: whether it says of each source if it sounds in the mixture at all.
        presence_threshold: probability from which a source counts as present, where it tells that; else None.
        limits_mask_sum: whether the sources and the residual add up to the mixture with no part louder than it.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: Graph,
        engine: Engine,
        encoders: Mapping[str, tuple[Graph, Engine]],
        chunking: Mapping[str, int] | None = None,
    ) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self.graph = graph
        self.calls = 0
        self.causal = graph.kind == "stream"
        self.by_name = bundle.by_name
        self.passed_over: tuple[str, ...] = ()
        self.unused_engines: tuple[str, ...] = ()
        self.classes = bundle.classes or tuple(str(k) for k in range(int(manifest["separator"].get("num_classes", 0))))
        self.sample_rate_hz = bundle.sample_rate_hz
        self.precision = graph.precision
        self.channels = int(manifest.get("channels", 1))
        self.can_go_unseen = any(tensor.name == "seen" for tensor in graph.inputs)
        self.tells_presence = any(tensor.name == PRESENCE for tensor in graph.outputs)
        self.presence_threshold = float(manifest["presence_threshold"]) if self.tells_presence else None
        self.limits_mask_sum = bool(manifest["separator"].get("front_end", {}).get("limit_mask_sum"))
        self._chunking = dict(manifest["chunking"] if chunking is None else chunking)
        self.clip_samples = int(self._chunking["clip_samples"])
        # Bundles that do not say so are of an avsep whose decoders all were.
        self._independent = bool(manifest.get("independent_sources", True))
        self._sources = tuple(
            VisualSource(v["role"], v["kind"], v["name"], v["dim"], v["frames"], float(v.get("rate_hz") or 0.0))
            for v in manifest["visual"]
        )
        self._engine = engine
        self._encoders = dict(encoders)
        shapes = {tensor.name: tensor.shape for tensor in graph.inputs}
        self._shapes = shapes
        batch, sources = shapes["class_ids"]
        largest = [profile["class_ids"]["max"] for profile in graph.profiles if "class_ids" in profile]
        usual = [profile["class_ids"]["opt"] for profile in graph.profiles if "class_ids" in profile]
        self._fixed_batch = batch if isinstance(batch, int) else None
        self._fixed_sources = sources if isinstance(sources, int) else None
        # an engine takes no more than its profile; ONNX Runtime takes anything, and keeps to it too
        self._most_batch = largest[0][0] if largest else None
        self._most_sources = largest[0][1] if largest else None
        self._usual_batch = self._fixed_batch or (usual[0][0] if usual else 1)
        self._usual_sources = self._fixed_sources or (usual[0][1] if usual else 1)
        self._layout = None
        if self.causal:
            self._layout = layout_of(
                manifest["transform"],
                int(manifest["transform"]["frames"]),
                graph.entry["stream"],
                graph.entry["inputs"],
                self.channels,
            )
        self._call = GraphCall(
            self._run_graph,
            graph.kind == "spectral",
            manifest["transform"],
            self._fixed_batch,
            self._fixed_sources,
            self._most_sources,
            self.channels,
        )
        self._encoded: OrderedDict[tuple[str, bytes], Array] = OrderedDict()
        self._lock = threading.Lock()  # engines give out buffers that their next call overwrites

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        provider: str = "auto",
        precision: str | None = None,
        threads: int = 0,
        *,
        context_s: float | None = None,
        engines: str | os.PathLike[str] | None = None,
    ) -> BundleSeparator:
        """Open a bundle and make its graphs ready.

        Args:
            bundle: a folder or tar of ``avsep export``.
            provider: ``cpu``, ``cuda`` or ``onnxruntime-tensorrt`` (ONNX Runtime's), ``openvino`` (on the CPU),
                ``tensorrt`` or ``tensorrt-rtx`` (an engine); it runs or is refused. ``auto``: an engine that was built
                here, CUDA or the CPU, whichever runs first.
            precision: of the graph, ``fp32``, ``fp16`` or ``int8``; None takes fp32 where the bundle has it.
            threads: of ONNX Runtime or OpenVINO; 0 leaves the number to it.
            context_s: seconds of each side of a chunk that are thrown away, at most a quarter of the chunk: more gives
                finer seams for more computing. None: what the bundle says, an eighth of the chunk.
            engines: folder of the engines, where they were built with ``--out``; None: ``engines`` in the bundle's.

        Raises:
            ExportError: the bundle is damaged, or does not run in this way here.
            UnknownNameError: an unknown provider.
            ConfigError: threads or context out of range.
        """
        if threads < 0:
            raise ConfigError(f"threads must not be negative, got {threads}")
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, hashes=False)  # checked when read
        if context_s is not None and any(g.kind == "stream" for g in opened.graphs):
            raise ConfigError(f"{opened.path} goes frame by frame and cuts no chunks: leave the context out")
        chunking = _chunking(opened, context_s)
        kinds = [kind for kind in ("separator", "spectral", "stream") if any(g.kind == kind for g in opened.graphs)]
        graph = opened.graph(kinds[0], precision)
        encoders = {}
        for source in opened.manifest["visual"]:
            if source["graph"] is not None:
                encoders[source["role"]] = next(g for g in opened.graphs if g.file == source["graph"])
        running, passed_over = open_session(opened, [graph, *encoders.values()], provider, threads, engines)
        made = cls(
            opened,
            graph,
            running[0],
            {role: (g, e) for (role, g), e in zip(encoders.items(), running[1:], strict=True)},
            chunking,
        )
        made.passed_over = passed_over
        plans = [plan.name for plan in Path(engines or engines_folder(opened)).glob("*.plan")]
        made.unused_engines = tuple(
            line for line in passed_over if any(f".{line.partition(':')[0]}-sm" in name for name in plans)
        )
        return made

    @property
    def provider(self) -> str:
        return self._engine.provider

    @property
    def latency_samples(self) -> int:
        """The most samples between a sample's arrival in a stream and its coming out, without the computing."""
        return self.clip_samples if self._layout is None else self._layout.latency_samples

    @property
    def block_samples(self) -> int | None:
        """Samples of one call, of a :attr:`causal` separator: blocks of so many samples come out soonest."""
        return None if self._layout is None else self._layout.frames * self._layout.hop

    @property
    def context_samples(self) -> int:
        return int(self._chunking["context_samples"])

    @property
    def visual_sources(self) -> tuple[VisualSource, ...]:
        """What it wants to see of each class."""
        return self._sources

    @property
    def frame_sizes(self) -> dict[str, tuple[int, int]]:
        """Height and width in pixels of the frames that the bundle's encoders take, by role."""
        shapes = {role: graph.inputs[0].shape for role, (graph, _) in self._encoders.items()}
        return {role: (int(shape[-2]), int(shape[-1])) for role, shape in shapes.items()}

    def separate(
        self,
        mixture: Array,
        features: Features | None = None,
        classes: Sequence[str] = (),
        rate_hz: int | None = None,
        *,
        batch: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Audio:
        """Separate a mixture [L] of any length into [N, L] float32, a row for each of ``classes``, in their order; or
        one of several channels [C, L] into [N, C, L].

        Args:
            mixture: float in +-1, or int16 or int32 at full scale; mono, or of the bundle's :attr:`channels`.
            features: for each source, by its name or its class's, what is seen of it, on the recording's time axis: by
                role (``object``, ``motion``) an array, or a function called with the middle of a chunk and its length
                in seconds; or a :class:`VisualTimeline`. Arrays: object features [D], or [n, D], one row a second
                (``object_rate_hz`` beside them says otherwise); motion features [D, T], one sequence for the
                whole recording; or frames, uint8 [n, C, H, W], where the bundle has the encoder's graph (8 a second
                for motion, or ``motion_rate_hz``). A function gives what the chunk sees: features [D], rows [K, D] or
                [D, T], or frames. Where :attr:`can_go_unseen`, classes without any may be left out, also all of them
                (None).
            classes: names, each once; or ``NAME=CLASS``, such as ``left=violin`` and ``right=violin``: sources of one
                class, told apart by what is seen of each.
            rate_hz: the mixture's, to be held against the separator's.
            batch: most chunks a call, for a graph whose batch is open.
            progress: called with (chunks done, chunks in all).

        Raises:
            AudioError: the mixture is empty, of other channels or another rate, or holds NaN.
            DataError: a class without features, or with those that the separator does not take.
            ConfigError, UnknownNameError: no classes, unknown ones, a name twice, or two of one class that nothing
                tells apart.
            NumericalError: the graph answers NaN.
        """
        return self.separate_with_presence(mixture, features, classes, rate_hz, batch=batch, progress=progress).sources

    def separate_with_presence(
        self,
        mixture: Array,
        features: Features | None = None,
        classes: Sequence[str] = (),
        rate_hz: int | None = None,
        *,
        batch: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Separated:
        """As :meth:`separate`, and for each class the probability that it sounds in the mixture at all
        (:class:`PresenceOfChunks`), to be held against :attr:`presence_threshold`. None of a bundle that does not
        tell."""
        asked = self.sources_of(classes)
        ids = [source.class_id for source in asked]
        self._check_count(len(ids))
        self._check_rate(rate_hz)
        audio = _samples(mixture)
        if audio.shape[-1] == 0:
            raise AudioError("the mixture is empty: there is nothing to separate")
        self._check_channels(audio.shape)
        views = self._views(features, asked)
        presence = PresenceOfChunks()
        if self.causal:
            self._batch(batch)
            channels = None if audio.ndim == 1 else len(audio)
            return self._whole_stream(Stream(self, ids, views, channels), audio, progress)

        def run(chunks: Audio, starts: Sequence[int]) -> Audio:
            return self._run(chunks, starts, ids, views, audio.shape[-1], presence)

        sources = separate_long(run, audio, batch=self._batch(batch), progress=progress, **self._chunking)
        return Separated(sources, presence.value)

    def _whole_stream(self, stream: Stream, audio: Audio, progress: Callable[[int, int], None] | None) -> Separated:
        """All of a recording as one stream, which leaves no seams."""
        starts = range(0, audio.shape[-1], self.clip_samples)
        parts = []
        for done, start in enumerate(starts):
            parts.append(stream.push(audio[..., start : start + self.clip_samples]))
            if progress is not None:
                progress(done + 1, len(starts))
        parts.append(stream.flush())
        return Separated(np.concatenate(parts, axis=-1), stream.presence)

    def stream(
        self,
        classes: Sequence[str],
        features: Features | None = None,
        rate_hz: int | None = None,
        *,
        channels: int | None = None,
    ) -> Stream:
        """Separate audio as it arrives, into the samples that :meth:`separate` gives of the whole.

        Arguments and errors as there. What is seen may be a function of time, asked for each chunk when its last sample
        has arrived; time zero is the stream's first sample. A :attr:`causal` separator asks for it as each clip's
        length of the stream begins, for that moment.

        Args:
            channels: C of blocks [C, l], which give [N, C, l']; None: blocks are mono, [l], and give [N, l'].
        """
        asked = self.sources_of(classes)
        self._check_count(len(asked))
        self._check_rate(rate_hz)
        if channels is not None:
            self._check_channels((channels, 0))
        return Stream(self, [s.class_id for s in asked], self._views(features, asked), channels)

    def sources_of(self, classes: Sequence[str]) -> list[Source]:
        """The sources that ``classes`` ask for, as :func:`avsep_runtime.recordings.sources_of` reads them.

        Raises:
            UnknownNameError: a class that the separator has not learned, or that the bundle leaves out; says why.
        """
        self.refuse_left_out(classes)
        return sources_of(self.classes, classes)

    def refuse_left_out(self, classes: Sequence[str]) -> None:
        """Raise :class:`UnknownNameError` of a class, also as ``NAME=CLASS``, that the bundle leaves out."""
        for name in classes:
            if (of := name.rpartition("=")[2].strip()) in self.bundle.left_out:
                raise UnknownNameError(
                    f"this bundle does not know '{of}', which was left out ({self.bundle.left_out[of]}): "
                    f"{listed(self.classes)}"
                )

    def check(self, features: Features | None, classes: Sequence[str]) -> None:
        """Raise what :meth:`separate` would raise of these features and classes."""
        asked = self.sources_of(classes)
        self._check_count(len(asked))
        self._views(features, asked)

    def warm_up(self, calls: int = 2) -> None:
        """Run all graphs on zeros, so that the first chunk is as fast as the others."""
        for _ in range(calls):
            inputs = {}
            for tensor in self.graph.inputs:
                sizes = {"batch": self._usual_batch, "sources": self._usual_sources}
                shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
                inputs[tensor.name] = np.zeros(shape, dtype=tensor.dtype)
            with self._lock:
                self._engine.run(inputs)
                for graph, engine in self._encoders.values():
                    engine.run({t.name: np.zeros(_sizes(t.shape), dtype=t.dtype) for t in graph.inputs})

    def close(self) -> None:
        """Give back the device's memory, and remove the temporary files of a bundle in a tar, if any."""
        with self._lock:
            for engine in (self._engine, *(engine for _, engine in self._encoders.values())):
                engine.close()
        self.bundle.close()

    def __enter__(self) -> BundleSeparator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- audio --------------------------------------------------------------------------------------------------------

    def _check_rate(self, rate_hz: int | None) -> None:
        if rate_hz is not None and rate_hz != self.sample_rate_hz:
            raise AudioError(
                f"the audio has {rate_hz} Hz, and this separator takes {self.sample_rate_hz} Hz: resample it first "
                f"(ffmpeg -i IN -ar {self.sample_rate_hz} -ac 1 OUT.wav), or use avsep separate --bundle, which does"
            )

    def _check_channels(self, shape: tuple[int, ...]) -> None:
        channels = shape[0] if len(shape) == 2 else 1
        if channels in (1, self.channels):
            return
        takes = "mono, [samples]" if self.channels == 1 else f"mono or [{self.channels}, samples]"
        raise AudioError(
            f"the audio must be {takes} for this bundle, got {channels} channels in shape {list(shape)}: take their "
            f"mean, or export it with --channels {channels}"
        )

    def _check_count(self, count: int) -> None:
        fixed = self._fixed_sources
        if self._independent or (fixed is None and count <= (self._most_sources or count)):
            return
        if count != fixed:
            takes = f"{fixed}" if fixed else f"at most {self._most_sources}"
            raise ConfigError(
                f"{count} classes are asked for, and this bundle's graph takes {takes} (its sources depend on each "
                f"other): export it with --sources {count}"
            )

    def _batch(self, batch: int | None) -> int:
        if batch is not None and batch < 1:
            raise ConfigError(f"batch must be at least 1, got {batch}")
        if self._fixed_batch is not None and batch not in (None, self._fixed_batch):
            raise ConfigError(
                f"this bundle's graph takes {self._fixed_batch} chunks a call, not {batch}: leave batch out, or "
                "export it with --dynamic"
            )
        if batch is None:
            return self._usual_batch
        return min(batch, self._most_batch or batch)

    def _run(
        self,
        chunks: Audio,
        starts: Sequence[int],
        ids: Sequence[int],
        views: Sequence[_View],
        total: int,
        presence: PresenceOfChunks,
    ) -> Audio:
        """[b, (C,) clip] from the samples ``starts`` on -> [b, N, (C,) clip]; ``total`` samples are there in all."""
        seen = [self._seen(view, starts, total) for view in views]  # N times {input name: [b, ...]}
        of_sources = {name: np.stack([one[name] for one in seen], axis=1) for name in seen[0]}  # [b, N, ...]
        of_sources["class_ids"] = np.tile(np.asarray(ids, dtype=np.int64), (len(starts), 1))
        with self._lock:
            result, told = self._call.tell(chunks, of_sources)
        presence.add(told)
        if not np.isfinite(result).all() or (told is not None and not np.isfinite(told).all()):
            raise NumericalError(
                f"the graph answers NaN or infinite samples near {starts[0] / self.sample_rate_hz:.1f} s on "
                f"{self.provider}: "
                + ("check it with avsep export verify" if self.precision == "fp32" else "use the fp32 graph")
            )
        return result

    def _run_graph(self, inputs: dict[str, Array]) -> Mapping[str, Array]:
        self.calls += 1
        return self._engine.run(inputs)

    def _frames_run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """One call of a graph that goes frame by frame, with arrays of its own."""
        with self._lock:
            outputs = {name: np.array(array) for name, array in self._run_graph(inputs).items()}
        if not np.isfinite(outputs["sources"]).all():
            raise NumericalError(
                f"the graph answers NaN or infinite samples on {self.provider}: check it with avsep export verify"
            )
        return outputs

    # --- what is seen -------------------------------------------------------------------------------------------------

    def _views(self, features: Features | None, asked: Sequence[Source]) -> list[_View]:
        """What is seen of each source; arrays are read once here, so that mistakes show before anything is computed."""
        check_moves(asked, self._sources)
        shown = by_name(features or {}, asked)
        views = []
        for one in asked:
            unseen = self.can_go_unseen and one.name not in shown
            if not self._sources or unseen:
                views.append(_View(one.label, {}, None, seen=not unseen))
                continue
            if one.name not in shown:
                raise DataError(nothing_of(one, features or {}))
            given = shown[one.name]
            if isinstance(given, VisualTimeline):
                view = _View(one.label, {}, given)
            else:
                view = _View(one.label, *self._split(one.label, given))
            for source in self._sources:
                if source.role not in view.sights:  # a function is not asked before its time
                    middle_s, clip_s = self.clip_samples / 2 / self.sample_rate_hz, self._clip_s
                    self._encode(source, view.read(source, middle_s, clip_s), view.label)
            views.append(view)
        check_told_apart(asked, shown)
        return views

    @property
    def _clip_s(self) -> float:
        return self.clip_samples / self.sample_rate_hz

    def _split(self, label: str, given: Any) -> tuple[dict[str, Sight], VisualTimeline | None]:
        """Functions by role, and the arrays as a timeline."""
        if not isinstance(given, Mapping):
            raise DataError(
                f"the features of {label} must be given by role, such as {{'object': array, 'motion': array}}"
            )
        known = {source.role for source in self._sources}
        rates = {f"{role}_rate_hz" for role in ("object", "motion")}
        for key in given:
            if key not in known | rates | {"object", "motion"}:
                raise DataError(f"{label} has features '{key}': the roles are {' and '.join(sorted(known))}")
        sights: dict[str, Sight] = {}
        arrays: dict[str, Any] = {"features": {}, "where": label}
        for rate in rates & given.keys():
            if not 0 < float(given[rate]) < float("inf"):
                raise DataError(f"{label}: {rate} must be positive, got {given[rate]}")
            arrays[rate] = float(given[rate])
        for source in self._sources:
            if source.role not in given:
                raise DataError(
                    f"{label} has no {source.role} features: this separator sees {' and '.join(sorted(known))}"
                )
            value = given[source.role]
            if callable(value):
                sights[source.role] = value
                continue
            array = np.asarray(value)
            if array.ndim == 4:
                _check_frames(array, source.role, label)
                arrays[source.role] = array
                if source.kind != "frames":
                    raise DataError(f"{label}: this separator takes {source.role} features, and was given frames")
            elif source.role == "object" and source.kind == "features" and array.ndim == 2:
                arrays["features"][source.name] = array  # cut and pooled as in training
            elif source.role == "object" and array.ndim == 2:
                sights["object"] = _rows(array, arrays.get("object_rate_hz", 1.0))
                self._encode(source, array[0], label)
            else:
                self._encode(source, array, label)
                sights[source.role] = _constant(array)
        return sights, VisualTimeline(**arrays)

    def _seen(self, view: _View, starts: Sequence[int], total: int) -> dict[str, Array]:
        """The graph's inputs of one source in each chunk: [b, D], [b, D, T] and, where it is asked for, [b, T]."""
        if not view.seen:
            return self._of_nothing(len(starts))
        rows: dict[str, list[Array]] = {}
        if self.can_go_unseen:
            rows["seen"] = [np.ones((), dtype=bool)] * len(starts)
        if "motion_seen" in self._shapes:
            rows["motion_seen"] = [np.array(view.moves)] * len(starts)
        for start in starts:
            for source in self._sources:
                middle_s = source.middle_s(start, self.clip_samples, total, self.sample_rate_hz)
                encoded = self._encode(source, view.read(source, middle_s, self._clip_s), view.label)
                if source.role == "motion":
                    steps = int(self._shapes["motion_features"][-1])
                    if "motion_mask" in self._shapes:
                        rows.setdefault("motion_mask", []).append(np.arange(steps) < encoded.shape[1])
                    encoded = np.pad(encoded, ((0, 0), (0, steps - encoded.shape[1])))
                rows.setdefault(f"{source.role}_features", []).append(encoded)
        return {name: np.stack(parts) for name, parts in rows.items()}

    def _of_nothing(self, count: int) -> dict[str, Array]:
        """The inputs of a source of which there is no picture: zeros, and ``seen`` says so."""
        flags = [name for name in ("seen", "motion_seen") if name in self._shapes]
        made: dict[str, Array] = {name: np.zeros(count, dtype=bool) for name in flags}
        for name, shape in self._shapes.items():
            if name.endswith("_features"):
                made[name] = np.zeros((count, *_sizes(shape[2:])), dtype=np.float32)
            elif name == "motion_mask":
                made[name] = np.ones((count, *_sizes(shape[2:])), dtype=bool)
        return made

    def _encode(self, source: VisualSource, raw: Any, label: str) -> Array:
        """What a chunk sees of a source, as the graph takes it: [D], or [D, T] with T at most the graph's.

        Frames go through the encoder's graph, once for the same frames: as often as what is seen changes, whatever
        the chunks are.
        """
        array = np.asarray(raw)
        where = f"{label}: {source.role}"
        if array.ndim == 4:
            _check_frames(array, source.role, label)
            return self._frames_encoded(source, array, where)
        if array.dtype.kind not in "fiu" or array.size == 0:
            raise DataError(f"{where} features must be numbers, got {array.dtype} {list(array.shape)}")
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise DataError(f"{where} features hold NaN or infinite values: extract them again")
        wanted = self._shapes[f"{source.role}_features"]
        width = int(wanted[2])
        if source.role == "object":
            if array.ndim == 2:
                array = array.max(axis=0)  # of consecutive frames, as the separator was trained
            if array.shape != (width,):
                raise DataError(
                    f"{where} features are {array.shape[-1] if array.ndim == 1 else list(array.shape)} wide, and this "
                    f"separator takes {width}: use the extractor that it was trained with"
                )
            return array
        steps = int(wanted[3])
        if array.ndim != 2 or array.shape[0] != width:
            raise DataError(
                f"{where} features have the shape {list(array.shape)}, and this separator takes [{width}, {steps}]: "
                "use the extractor that it was trained with"
            )
        if array.shape[1] > steps or (array.shape[1] < steps and "motion_mask" not in self._shapes):
            raise DataError(
                f"{where} features have {array.shape[1]} steps, and this bundle's graph takes {steps}: export it with "
                f"--motion-steps {array.shape[1]}"
            )
        return array

    def _frames_encoded(self, source: VisualSource, frames: Array, where: str) -> Array:
        if source.role not in self._encoders:
            raise DataError(f"{where}: this bundle has no graph of a {source.role} encoder, so give features")
        graph, engine = self._encoders[source.role]
        (tensor,) = graph.inputs
        shape = tensor.shape[1:]
        if frames.shape != shape:
            raise DataError(
                f"{where} frames are {list(frames.shape)}, and the bundle's {graph.file} takes {list(shape)} "
                "(number, channels, height, width): bring them to that size, or export it for yours"
            )
        key = (source.role, hashlib.blake2b(frames.tobytes(), digest_size=16).digest())
        with self._lock:
            found = self._encoded.pop(key, None)
            if found is None:
                first = tensor.shape[0] if isinstance(tensor.shape[0], int) else 1
                block = np.broadcast_to(frames.astype(tensor.dtype), (first, *frames.shape))
                (output,) = engine.run({tensor.name: block}).values()
                found = np.array(output[0], dtype=np.float32)
                if not np.isfinite(found).all():
                    raise NumericalError(f"{graph.file} answers NaN or infinite features on {engine.provider}")
            self._encoded[key] = found  # the last one used stands last
            while len(self._encoded) > _MOST_ENCODED:
                self._encoded.popitem(last=False)
        return found


class Stream:
    """Audio in, separated audio out, block by block. Made by :meth:`BundleSeparator.stream`."""

    def __init__(
        self, separator: BundleSeparator, ids: Sequence[int], views: Sequence[_View], channels: int | None = None
    ) -> None:
        self._separator = separator
        self._presence = PresenceOfChunks()
        self._channels = channels
        self._parts: list[FrameStream] = []
        self._ids, self._views = ids, views
        if separator._layout is not None:
            width = separator._layout.sources or len(ids)
            for first in range(0, len(ids), width):
                self._parts.append(self._frame_stream(separator._layout, slice(first, first + width)))
            return

        def run(chunks: Audio, starts: Sequence[int]) -> Audio:
            return separator._run(chunks, starts, ids, views, self._stream.received_samples, self._presence)

        self._stream = LongStream(run, len(ids), channels=channels, **separator._chunking)

    def _frame_stream(self, layout: StreamLayout, of: slice) -> FrameStream:
        """A stream of some of the sources, as many as the graph takes."""
        separator, ids, views = self._separator, self._ids[of], self._views[of]

        def look(start: int) -> dict[str, Array]:
            seen = [separator._seen(view, [start], start) for view in views]  # nothing later is there
            of_sources = {name: np.stack([one[name] for one in seen], axis=1) for name in seen[0]}
            return {**of_sources, "class_ids": np.asarray([ids], dtype=np.int64)}

        return FrameStream(separator._frames_run, layout, len(ids), look, channels=self._channels)

    @property
    def provider(self) -> str:
        return self._separator.provider

    @property
    def latency_samples(self) -> int:
        """The most samples between a sample's arrival and its coming out, without the time of computing."""
        return self._separator.latency_samples

    @property
    def presence(self) -> Audio | None:
        """For each class [N] the probability that it sounds in what was separated so far;
        None before the first chunk, and of a bundle that does not tell."""
        told = [part.presence for part in self._parts]
        parts = [one for one in told if one is not None]
        return np.concatenate(parts) if parts and len(parts) == len(told) else self._presence.value

    def push(self, block: Array) -> Audio:
        """Take the next samples [l] or [C, l], any number of them, and give those that are ready: [N, l'] or
        [N, C, l'], l' >= 0.

        A block that is no audio is refused and leaves the stream as it was; after any other error it cannot go on.
        """
        samples = _samples(block)
        if self._channels is None and samples.ndim != 1:
            raise AudioError(
                f"the audio must be mono, [samples], got shape {list(samples.shape)}: take the mean of its channels, "
                "or begin a stream of channels, stream(..., channels=C)"
            )
        if self._parts:
            return np.concatenate([part.push(samples) for part in self._parts])
        return self._stream.push(samples)

    def flush(self) -> Audio:
        """The audio has ended: give the rest, [N, (C,) l']. The stream is used up then."""
        if self._parts:
            return np.concatenate([part.flush() for part in self._parts])
        return self._stream.flush()


class _View:
    """What is seen of one source: functions by role, and a timeline for the other roles; nothing where not ``seen``.
    ``label`` is what messages call it."""

    def __init__(
        self, label: str, sights: Mapping[str, Sight], timeline: VisualTimeline | None, *, seen: bool = True
    ) -> None:
        self.label = label
        self.seen = seen
        self.moves = timeline is None or timeline.moves
        self.sights = sights
        self._timeline = timeline

    def read(self, source: VisualSource, middle_s: float, duration_s: float) -> Any:
        if source.role in self.sights:
            return self.sights[source.role](middle_s, duration_s)
        assert self._timeline is not None
        return self._timeline.read(source, centre_s=middle_s, duration_s=duration_s)


def _chunking(bundle: Bundle, context_s: float | None) -> dict[str, int]:
    """The bundle's chunking, with another context where one is asked for."""
    stated: dict[str, int] = dict(bundle.manifest["chunking"])
    if context_s is None:
        return stated
    clip = stated["clip_samples"]
    context = context_in_samples(context_s, clip_samples=clip, sample_rate_hz=bundle.sample_rate_hz)
    return {**stated, "context_samples": context, "crossfade_samples": default_crossfade(context)}


def _constant(array: Array) -> Sight:
    return lambda middle_s, duration_s: array


def _rows(array: Array, rate_hz: float) -> Sight:
    """Encoded already: the row of the moment, the last one beyond the end."""
    return lambda middle_s, duration_s: array[min(max(int(middle_s * rate_hz + 1e-9), 0), len(array) - 1)]


def _sizes(shape: Sequence[int | str]) -> list[int]:
    return [1 if isinstance(size, str) else size for size in shape]


def _check_frames(array: Array, role: str, label: str) -> None:
    if array.dtype != np.uint8 or array.size == 0:
        raise DataError(
            f"{label}: {role} frames must be uint8 [number, channels, height, width], got {array.dtype} "
            f"{list(array.shape)}"
        )


def _samples(samples: Array) -> Audio:
    """[L] or [C, L] float32 in +-1.

    Raises:
        AudioError: what is given is no such thing; the message says what to do.
    """
    array = np.asarray(samples)
    if array.ndim not in (1, 2) or (array.ndim == 2 and not len(array)):
        raise AudioError(
            f"the audio must be [samples] or [channels, samples], got shape {list(array.shape)}: take the mean of its "
            "channels"
        )
    if array.dtype in (np.dtype(np.int16), np.dtype(np.int32)):
        return (array / -float(np.iinfo(array.dtype).min)).astype(np.float32)
    if array.dtype.kind != "f":
        raise AudioError(f"audio samples must be float in +-1, int16 or int32, got {array.dtype}")
    array = array.astype(np.float32)
    check_samples("the audio", array)
    return array
