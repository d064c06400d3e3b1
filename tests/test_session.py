"""What an engine owns on a GPU, on a stand-in for torch.cuda with two cards."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdvae.engine import arena, graphs, memory
from sdvae.engine import run as running
from sdvae.engine.plan import Plan
from sdvae.engine.session import DeviceSession
from sdvae.errors import BudgetError
from tests.test_execute import MODELS, inputs
from tests.test_triton_engine import compiled, gpu_plan

CARDS = [torch.device("cuda", 0), torch.device("cuda", 1)]


class Stream:
    def __init__(self, device: torch.device) -> None:
        self.device = torch.device(device)
        self.waited_for: list[object] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited_for.append(other)

    def wait_event(self, event: "Event") -> None:
        self.waited_for.append(event.stream)


class Event:
    def __init__(self) -> None:
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.stream = stream


class TwoCards:
    """torch.cuda as far as an engine goes: which card and stream is current where something is launched."""

    def __init__(self) -> None:
        self._here = threading.local()
        self.log: list[tuple[str, object]] = []
        self.refusal: str | None = None
        self.is_capturing = False
        self.defaults = {card: Stream(card) for card in CARDS}
        self.Stream, self.Event = Stream, Event
        self.CUDAGraph = lambda: SimpleNamespace(replay=lambda: self.log.append(("replay", self.current_stream())))

    @property
    def card(self) -> torch.device:
        return getattr(self._here, "card", CARDS[0])

    def current_stream(self, card: torch.device | None = None) -> Stream:
        stream: Stream | None = getattr(self._here, "stream", None)
        return stream if stream and stream.device == (card or self.card) else self.defaults[card or self.card]

    @contextmanager
    def device(self, card: torch.device) -> Iterator[None]:
        before, self._here.card = self.card, card
        yield
        self._here.card = before

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._here.stream = getattr(self._here, "stream", None), stream
        with self.device(stream.device):
            yield
        self._here.stream = before

    @contextmanager
    def graph(self, graph: object, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        self.log.append(("capture", capture_error_mode))
        if self.refusal:
            raise RuntimeError(self.refusal + "\nand a trace")
        self.is_capturing = True
        with self.stream(stream):
            yield
        self.is_capturing = False

    def launch(self) -> None:
        self.log.append(("launch", self.current_stream()))

    def empty_cache(self) -> None:
        assert not self.is_capturing
        self.log.append(("empty_cache", self.card))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> TwoCards:
    cards = TwoCards()
    monkeypatch.setattr(torch, "cuda", cards)
    return cards


@pytest.fixture
def run_on(cuda: TwoCards, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Runs an image with a card's session; kernels only launch, tensors lie on the CPU."""
    program = compiled("plain", "decode")
    images = inputs("plain", "decode", 1, 1)
    plan = gpu_plan(program, images)

    def launched(program: Any, plan: Plan, memory: Any, image: Tensor, out: Tensor) -> None:
        assert cuda.card == program.kernels, "the kernels' own card is the current one"
        cuda.launch()

    def executed(program: Any, plan: Plan, images: Tensor, **arguments: Any) -> Tensor:
        launched(program, plan, None, images, images)
        return images

    monkeypatch.setattr(graphs, "execute_image", launched)
    monkeypatch.setattr(graphs, "execute", executed)

    def run(executor: graphs.Executor, session: DeviceSession) -> Tensor:
        here = replace(program, kernels=session.device)  # type: ignore[arg-type]
        known = executor._last.program if executor._last else here
        with session.guard():
            return executor.run(session, known, plan, images)

    return run


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_a_card_captures_and_launches_on_itself(
    cuda: TwoCards, run_on: Callable[..., Tensor], card: torch.device
) -> None:
    session, executor = DeviceSession(card), graphs.Executor()
    for _ in range(3):
        run_on(executor, session)
    streams = [where for what, where in cuda.log if what == "launch"]
    assert len(streams) == 3, "once without a graph, once before the capture, once inside of it"
    assert [stream.device for stream in streams if isinstance(stream, Stream)] == [card] * 3
    assert streams[1] is streams[2] is not streams[0], "libraries choose on the stream that is captured"
    assert [where for what, where in cuda.log if what == "replay"] == [cuda.defaults[card]] * 2
    assert ("capture", "thread_local") in cuda.log, "other threads may use CUDA meanwhile"


def test_a_thread_that_did_not_warm_up_captures_all_the_same(cuda: TwoCards, run_on: Callable[..., Tensor]) -> None:
    """cuDNN keeps its choices for each thread apart: what captures has launched before, in the same thread."""
    session, executor = DeviceSession(CARDS[0]), graphs.Executor()
    run_on(executor, session)
    launches: dict[str, list[int]] = {"launch": [], "capture": []}
    record = cuda.launch
    cuda.launch = lambda: (
        launches["capture" if cuda.is_capturing else "launch"].append(threading.get_ident()),
        record(),
    )  # type: ignore[method-assign]
    thread = threading.Thread(target=run_on, args=(executor, session))
    thread.start()
    thread.join(60)
    assert len(launches["launch"]) == len(launches["capture"]) == 1
    assert launches["launch"] == launches["capture"]


def test_a_refused_capture_is_told_once_and_never_tried_again(
    cuda: TwoCards, run_on: Callable[..., Tensor], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.refusal = "operation not permitted when stream is capturing"
    session, executor = DeviceSession(CARDS[1]), graphs.Executor()
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert run_on(executor, session) is not None
    assert [record.getMessage() for record in caplog.records] == [
        f"no CUDA graph can be captured on cuda:1, so runs are launched one by one: {cuda.refusal}"
    ]
    assert sum(what == "capture" for what, _ in cuda.log) == 1
    monkeypatch.setenv("SDVAE_STRICT", "1")
    session, executor = DeviceSession(CARDS[1]), graphs.Executor()
    run_on(executor, session)
    with pytest.raises(RuntimeError, match="not permitted"):
        run_on(executor, session)


def test_replays_wait_for_each_other_on_any_stream(cuda: TwoCards, run_on: Callable[..., Tensor]) -> None:
    session, executor = DeviceSession(CARDS[0]), graphs.Executor()
    for _ in range(2):
        run_on(executor, session)
    mine = Stream(CARDS[0])
    with cuda.stream(mine):
        run_on(executor, session)
    assert mine.waited_for == [cuda.defaults[CARDS[0]]]


def test_what_a_graph_holds_counts_as_free_for_its_size(cuda: TwoCards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a device with room for one run and no two would change its plan at each call."""
    engine = running.Engine(MODELS["plain"], MODELS["plain"].config, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(running, "free_bytes", lambda device: 1000)
    assert engine._free_bytes(CARDS[0], "decode") == 1000
    executor = engine._executors["decode"] = graphs.Executor()
    assert engine._free_bytes(CARDS[0], "decode") == 1000
    program, images = compiled("plain", "decode"), inputs("plain", "decode", 1, 1)
    plan = gpu_plan(program, images)
    executor._last = graphs._Call(program, plan, images.shape[2:], (False, True))
    assert engine._free_bytes(CARDS[0], "decode") == 1000, "nothing is captured yet"
    executor._last.graph = graphs.ImageGraph(CARDS[0], None, None, images, images)  # type: ignore[arg-type]
    assert engine._free_bytes(CARDS[0], "decode") == 1000 + plan.predict_bytes()
    assert engine._free_bytes(CARDS[0], "encode") == 1000
    executor.make_room(torch.Size((9, 9)))
    assert engine._free_bytes(CARDS[0], "decode") == 1000
    assert memory.free_bytes is not running.free_bytes


class Cudart:
    """Pins what it is asked to, up to a limit; waits are counted."""

    def __init__(self, limit: int) -> None:
        self.limit, self.pinned, self.num_waits = limit, dict[int, int](), 0

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        if sum(self.pinned.values()) + num_bytes > self.limit:
            return 2
        self.pinned[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802
        del self.pinned[address]


@pytest.fixture
def cudart(cuda: TwoCards, monkeypatch: pytest.MonkeyPatch) -> Cudart:
    found = Cudart(10_000)

    def wait() -> None:
        found.num_waits += 1

    monkeypatch.setattr(cuda, "cudart", lambda: found, raising=False)
    monkeypatch.setattr(cuda, "synchronize", wait, raising=False)
    return found


def test_pinned_memory_is_kept_and_grows(cudart: Cudart) -> None:
    pinned = arena.PinnedMemory()
    first = pinned.take(1000, torch.float16)
    assert first.shape == (1000,) and first.dtype == torch.float16
    assert pinned.take(250, torch.float32).data_ptr() == first.data_ptr()
    assert list(cudart.pinned.values()) == [2000] and cudart.num_waits == 0
    pinned.take(1001, torch.float32)
    assert list(cudart.pinned.values()) == [4004] and cudart.num_waits == 1, (
        "no kernel is at work in what is given back"
    )
    pinned.free()
    pinned.free()
    assert not cudart.pinned and cudart.num_waits == 2
    pinned.take(10, torch.float32)
    del pinned
    assert not cudart.pinned, "nor does it outlive its owner"


def test_memory_that_cannot_be_pinned_is_a_budget_error(cudart: Cudart) -> None:
    with pytest.raises(BudgetError, match=r"could not be pinned for the GPU \(CUDA error 2\); give"):
        arena.PinnedMemory().take(10_001, torch.uint8)
    assert not cudart.pinned


def test_a_failed_wait_still_gives_the_memory_back(cudart: Cudart, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = arena.PinnedMemory()
    pinned.take(8, torch.float32)

    def fail() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        pinned.free()
    assert not cudart.pinned


def test_on_a_cpu_nothing_is_owned() -> None:
    session = DeviceSession(torch.device("cpu"))
    with session.guard():
        assert not session.has_graphs and session.capture(lambda: pytest.fail("it was called")) is None
    session.release()
