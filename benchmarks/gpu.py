"""π0.5 at full size on one CUDA device: does it run right there, and how fast? `python -m benchmarks.gpu`

Every part is a process of its own, and its figures are written as soon as it ends: the command goes on where it was
stopped, and --again measures anew. It stops by itself after ten minutes. Where there is no CUDA device, it says so.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import check_equal, environment, meets
from benchmarks.sizes import BASE, DEBUG, ONE_ROBOT, Work
from pi05_lightning.losses import mean_terms, total_loss
from pi05_lightning.models.capture import CapturedChunk
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.parallelize import Lora, Sharding, begin_sharded, checkpoint_blocks, compile_blocks, shard
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.quantized import Kind
from pi05_lightning.module import Pi05Module, default_optimizer
from pi05_lightning.optim import MakeOptimizer, param_groups
from pi05_lightning.profiling.accelerators import ACCELERATORS
from pi05_lightning.profiling.rate import matmul_rate, wait_for
from pi05_lightning.profiling.step import StepShape
from pi05_lightning.recipe import Recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
GIB = 2**30
LIMIT = 300  # seconds of a part
MINUTES = 10.0  # of the command
CHUNK_TOLERANCE = 2**-6  # of the largest action, in bf16: some of its own steps


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    name: str
    value: float
    unit: str
    goal: str = ""
    """`>= 3` or `<= 0.5`; empty where no goal was set."""


@dataclass(frozen=True)
class Place:
    """Where it is measured. quick: debug sizes and few repeats, on whatever device there is."""

    quick: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def config(self) -> ModelConfig:
        return DEBUG if self.quick else BASE

    @property
    def peak(self) -> float:
        """The published bf16 rate of this device, FLOP/s; of an H100 where it is not known."""
        name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
        return next((found for key, found in ACCELERATORS.items() if key in name), ACCELERATORS["h100"]).bf16

    def seconds(self, work: Callable[[], object], repeats: int, warm_up: int = 2) -> float:
        """Median of some calls, each waited for."""
        times = []
        for number in range(2 if self.quick else warm_up + repeats):
            start = time.perf_counter()
            work()
            wait_for(self.device)
            if number >= (1 if self.quick else warm_up):
                times.append(time.perf_counter() - start)
        return statistics.median(times)


# --- training


@dataclass(frozen=True)
class Training:
    """A training step: of which stage, in which precision, on how many samples."""

    batch: int
    precision: str = "bf16-true"
    checkpointing: bool = False
    compile: bool = False
    lora: bool = False
    base: Kind | None = None
    """What the layers beside adapters are kept as."""
    eight_bits: bool = False
    """AdamW's state, by torchao."""
    pretrain: bool = False
    goal: str = ""

    @property
    def shape(self) -> StepShape:
        """Stage 1 predicts tokens, stage 2 actions."""
        return StepShape(self.batch, target_tokens=50 if self.pretrain else 0)

    @property
    def name(self) -> str:
        parts = ["pretrain" if self.pretrain else "posttrain", self.precision]
        parts += [word for word in ("lora", "checkpointing", "compile") if getattr(self, word)]
        parts += [f"{self.base} base"] * (self.base is not None) + ["8-bit AdamW"] * self.eight_bits
        return f"training step, {', '.join(parts)}, batch {self.batch}"

    @property
    def optimizer(self) -> MakeOptimizer:
        if not self.eight_bits:
            return default_optimizer
        from torchao.optim import AdamW8bit  # takes seconds to import

        return partial(AdamW8bit, lr=2e-4, weight_decay=0.01)


def training(case: Training) -> Callable[[Place], list[Figure]]:
    """Forward, backward, clipping and the optimizer's step, on `case.batch` samples or as many as there is room for."""

    def measure(place: Place) -> list[Figure]:
        for batch in (case.batch, case.batch * 3 // 4, case.batch // 2, case.batch // 4):
            try:
                return measured(replace(case, batch=batch), place)
            except torch.OutOfMemoryError as error:
                print(f"    batch {batch}: {str(error).splitlines()[0][:80]}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
        raise AssertionError(f"not even a quarter of {case.batch} samples fit")

    return measure


def sharded(case: Training) -> Callable[[Place], list[Figure]]:
    """The same with a model that FSDP2 divides between all GPUs of the machine, each of which has `case.batch` samples.

    Without a GPU between two processes.
    """

    def measure(place: Place) -> list[Figure]:
        ranks = torch.cuda.device_count() or 2
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(on_rank, (ranks, folder, case, place), nprocs=ranks)
            return read_figures(Path(folder, "figures.json"))

    return measure


def on_rank(rank: int, ranks: int, folder: str, case: Training, place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if place.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    compute = torch.bfloat16 if case.precision == "bf16-mixed" else None
    figures = measured(case, place, Sharding(init_device_mesh(place.device.type, (ranks,)), compute))
    if rank == 0:
        write_figures(figures, Path(folder, "figures.json"))
    dist.destroy_process_group()


def measured(case: Training, place: Place, sharding: Sharding | None = None) -> list[Figure]:
    """Samples per second, and the share of the peak of what a step needs, which is less than what is computed again."""
    device, mixed = place.device, case.precision == "bf16-mixed"
    module = Pi05Module(
        place.config,
        case.optimizer,
        lora=Lora() if case.lora else None,
        base=case.base,
        activation_checkpointing=case.checkpointing,
        compile=case.compile,
    )
    module.follow(Recipe.of(pretrain_steps=int(case.pretrain), posttrain_steps=int(not case.pretrain)))
    stage = module.recipe.reached[0]
    weights = {"fast": 1.0} if case.pretrain else {"flow": stage.flow_alpha}
    torch.set_default_dtype(torch.float32 if mixed else torch.bfloat16)
    with torch.device(device):
        if sharding is None:
            module.configure_model()
        else:
            configure_shards(module, sharding)
    torch.set_default_dtype(torch.float32)
    model = module.model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not stage.freezes(name)
    groups = param_groups(((n, p) for n, p in model.named_parameters() if p.requires_grad), module.recipe)
    optimizer = module.make_optimizer(groups)
    batch = case.shape.batch(place.config, device)
    casts = mixed and sharding is None  # FSDP does it otherwise

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16) if casts else nullcontext():
            loss = loss_of(model, batch, weights)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    wait_for(device)
    first = time.perf_counter() - start
    seconds = place.seconds(step, repeats=6)
    needed, computed = (
        case.batch * flops_of_sample(module, case, weights, again) / seconds / place.peak
        for again in (False, case.checkpointing)
    )
    ranks = sharding.mesh.size() if sharding else 1
    name = f"{case.name} on each of {ranks} ranks, sharded" if sharding else case.name
    figures = [
        Figure(name, ranks * case.batch / seconds, "samples/s"),
        Figure(f"{name}: share of the bf16 peak", needed, "", case.goal),
        Figure(f"{name}: first step", first, "s"),
    ]
    if case.checkpointing:
        figures.append(Figure(f"{name}: share of the bf16 peak with what is computed again", computed, ""))
    if device.type == "cuda":
        figures.append(Figure(f"{name}: peak memory", torch.cuda.max_memory_allocated() / GIB, "GiB"))
    return figures


def configure_shards(module: Pi05Module, sharding: Sharding) -> None:
    """As `Pi05Module.configure_model` does under the strategy fsdp2, without a trainer."""
    model = module.model.to(torch.get_default_dtype())
    shard(model, sharding)
    model.to_empty(device=torch.get_default_device())
    torch.manual_seed(0)  # every rank draws the same, and keeps its slices
    model.reset_parameters()
    begin_sharded(model)
    if module.compile_model:
        compile_blocks(model)
    if module.activation_checkpointing:
        checkpoint_blocks(model)


def loss_of(model: Pi05, batch: Any, weights: dict[str, float]) -> Tensor:
    terms = model(batch, weights)
    means, _ = mean_terms(terms, {name: term.mask.sum() for name, term in terms.items()})
    return total_loss(means, weights)


def flops_of_sample(module: Pi05Module, case: Training, weights: dict[str, float], checkpointing: bool) -> int:
    """FLOPs of a step, as `FlopCounterMode` counts them, of each of its samples."""
    counted = Pi05Module(module.config, lora=module.lora, activation_checkpointing=checkpointing)
    model = counted.blank(module.recipe.reached[0])
    batch = replace(case.shape, batch_size=1).batch(module.config, "meta")
    with FlopCounterMode(display=False) as counter:
        loss_of(model, batch, weights).backward()
    return counter.get_total_flops()


# --- action chunks


def random_model(place: Place, dtype: torch.dtype = torch.bfloat16) -> Pi05:
    with torch.device("meta"):
        model = Pi05(place.config)
    model.to(dtype).to_empty(device=place.device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # adaRMS too, which begins as zero
            parameter.normal_(0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return model.eval()


def chunks(place: Place) -> list[Figure]:
    """One robot's chunk of ten Euler steps, in bf16: launched kernel by kernel, and as one CUDA graph."""
    figures, model, config = [], random_model(place), place.config
    ways: dict[str, Callable[..., Tensor]] = {"eager": model.chunk}
    if place.device.type == "cuda":
        ways |= {"CUDA graph": CapturedChunk(model), "compiled CUDA graph": CapturedChunk(model, compile=True)}
    noise = torch.randn(1, config.horizon, config.action_dim).to(place.device)
    for cameras in (2, 3):
        shape = StepShape(cameras=cameras, prompt_tokens=64)
        batch = replace(shape.batch(config), actions=torch.zeros(0, config.horizon, config.action_dim)).to(place.device)
        expected = model.chunk(batch, noise)
        for way, chunk in ways.items():
            name = f"one chunk, {way}, {cameras} cameras"
            start = time.perf_counter()
            check_equal(name, chunk(batch, noise), expected, CHUNK_TOLERANCE)
            if way != "eager":
                figures.append(Figure(f"{name}: first", time.perf_counter() - start, "s"))
            seconds = place.seconds(lambda c=chunk, b=batch: c(b, noise), repeats=30)
            figures.append(Figure(name, 1e3 * seconds, "ms", "<= 40" if way.startswith("compiled") else ""))
    if place.device.type == "cuda":
        figures.append(Figure("chunks: peak memory", torch.cuda.max_memory_allocated() / GIB, "GiB"))
    return figures


# --- what it all stands on


def ceilings(place: Place) -> list[Figure]:
    """What this device reaches at best: a large bf16 product, and a large copy (bytes read and written)."""
    size = 1 << (16 if place.quick else 31)
    source, target = (torch.empty(size, dtype=torch.uint8, device=place.device) for _ in range(2))
    seconds = place.seconds(lambda: target.copy_(source), repeats=20)
    return [
        Figure(
            "bf16 product", matmul_rate(torch.bfloat16, place.device, 256 if place.quick else None) / 1e12, "TFLOP/s"
        ),
        Figure("copy", 2 * size / seconds / 1e12, "TB/s"),
    ]


def tests(place: Place) -> list[Figure]:
    """The tests marked `gpu`."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-n", "4", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout[-6000:], flush=True)
    if done.returncode:
        raise AssertionError(f"pytest ended with {done.returncode}")
    return [Figure("tests marked gpu, all passed", time.perf_counter() - start, "s")]


# --- against LeRobot

PEER_BATCH = 8


def peer(place: Place) -> list[Figure]:
    """The same weights and inputs, in LeRobot's own bf16: a chunk, and forward and backward with checkpointing."""
    from benchmarks.peer import build_lerobot, make_inputs, randomize, with_weights_of
    from pi05_lightning.models.parallelize import checkpoint_blocks, compile_blocks

    config, device = place.config, place.device
    with torch.device(device):
        lerobot = build_lerobot(config, dtype="bfloat16")
    randomize(lerobot)
    ours = with_weights_of(lerobot, config)
    figures = []
    for cameras, work in ((2, ONE_ROBOT), (3, Work(batch=1, present=(True, True, True), tokens=200))):
        inputs = make_inputs(config, work, str(device))
        lerobot.eval()
        ours.eval()
        with torch.no_grad():
            check_equal("chunk", inputs.our_chunk(ours), inputs.lerobot_chunk(lerobot), CHUNK_TOLERANCE)
            assert inputs.batch.noise is not None
            ways = {
                "LeRobot": partial(inputs.lerobot_chunk, lerobot),
                "ours, eager": partial(inputs.our_chunk, ours),
            }
            if device.type == "cuda":
                ways["ours, compiled CUDA graph"] = partial(
                    CapturedChunk(ours, compile=True), inputs.batch, inputs.batch.noise[:, 0]
                )
            seconds = {way: place.seconds(chunk, repeats=10) for way, chunk in ways.items()}
        figures += compared(f"one chunk, {cameras} of 3 cameras", seconds)
    lerobot.train()
    ours.train()
    lerobot.gradient_checkpointing_enable()
    compiled = with_weights_of(lerobot, config).train()
    compile_blocks(compiled)
    for model in (ours, compiled):
        checkpoint_blocks(model)
    inputs = make_inputs(config, Work(batch=2 if place.quick else PEER_BATCH), str(device))

    def step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            value = loss().mean()
            value.backward()
            model.zero_grad(set_to_none=True)
            return value.detach()

        return run

    steps = {
        "LeRobot": step(lerobot, lambda: inputs.lerobot_loss(lerobot)),
        "ours, eager": step(ours, lambda: inputs.our_loss(ours)),
        "ours, compiled": step(compiled, lambda: inputs.our_loss(compiled)),
    }
    expected, *losses = (run() for run in steps.values())
    for loss in losses:
        check_equal("loss", loss, expected, CHUNK_TOLERANCE)
    seconds = {way: place.seconds(run, repeats=5) for way, run in steps.items()}
    name = f"forward and backward with checkpointing, batch {PEER_BATCH}, 2 of 3 cameras, 60 of 200 tokens"
    return [*figures, *compared(name, seconds)]


def compared(name: str, seconds: dict[str, float]) -> list[Figure]:
    """Of each way its time, and how many times faster than LeRobot each of ours is; the fastest has the goal."""
    fastest = min(seconds, key=seconds.__getitem__)
    times = [Figure(f"{name}: {way}", 1e3 * value, "ms") for way, value in seconds.items()]
    ratios = [
        Figure(f"{name}: LeRobot over {way}", seconds["LeRobot"] / value, "×", ">= 2" if way == fastest else "")
        for way, value in seconds.items()
        if way != "LeRobot"
    ]
    return [*times, *ratios]


# --- the command

PARTS: dict[str, Callable[[Place], list[Figure]]] = {
    "tests": tests,
    "ceilings": ceilings,
    "chunks": chunks,
    "train-mixed": training(Training(16, "bf16-mixed", checkpointing=True)),
    "train-checkpointed": training(Training(32, checkpointing=True)),
    "train-kept": training(Training(12)),
    "train-lora": training(Training(12, lora=True)),
    "train-nf4": training(Training(12, checkpointing=True, lora=True, base="nf4")),
    "train-int8": training(Training(12, checkpointing=True, lora=True, base="int8")),
    "train-8-bit": training(Training(32, checkpointing=True, eight_bits=True)),
    "train-sharded": sharded(Training(8, "bf16-mixed", checkpointing=True)),
    "train-pretrain": training(Training(32, checkpointing=True, pretrain=True)),
    "train-mixed-compiled": training(Training(40, "bf16-mixed", checkpointing=True, compile=True, goal=">= 0.45")),
    "train-checkpointed-compiled": training(Training(64, checkpointing=True, compile=True, goal=">= 0.45")),
    "train-kept-compiled": training(Training(24, compile=True, goal=">= 0.45")),
    "peer": peer,
}
NEEDS = {"tests": ("lerobot", "av", "duckdb"), "peer": ("lerobot",)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--again", action="store_true", help="measure also what is in the results already")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results are (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="debug sizes, on the CPU too: only to see that it runs")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="to stop after (default: %(default)g)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        write_figures(PARTS[args.part](Place(args.quick)), args.json)
        return
    if not torch.cuda.is_available() and not args.quick:
        print("There is no CUDA device here: nothing to measure.")
        return
    results = json.loads(args.json.read_text(encoding="utf-8")) if args.json.is_file() else {"parts": {}}
    results["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results["environment"] = environment()
    failed, left, end = [], [], time.monotonic() + 60 * args.minutes
    for part in args.only:
        missing = [name for name in NEEDS.get(part, ()) if importlib.util.find_spec(name) is None]
        if missing:
            print(f"--- {part}: left out, as {', '.join(missing)} is not installed", flush=True)
        elif part in results["parts"] and not args.again:
            print(f"--- {part}: measured before", flush=True)
        elif (seconds := end - time.monotonic()) <= 0:
            left.append(part)
        else:
            print(f"--- {part}", flush=True)
            figures = in_its_own_process(part, args.json, args.quick, min(LIMIT, seconds))
            if figures is None:
                (failed if time.monotonic() < end else left).append(part)
                continue
            results["parts"][part] = figures
            write(results, args.json)
    print(f"\n{results['device']}\n{results['environment']}\n\n{table(results)}")
    if left:
        print(f"\nAfter {args.minutes:g} minutes these are left; the same command goes on with them: {', '.join(left)}")
    if failed:
        sys.exit(f"these parts failed: {', '.join(failed)}")


def in_its_own_process(part: str, beside: Path, quick: bool, limit: float) -> list[dict[str, Any]] | None:
    """Its figures, None where it failed, or took more than so many seconds."""
    output = beside.with_name(f".{part}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--json", str(output)]
    start = time.perf_counter()
    try:
        code = subprocess.run([*command, "--quick"] if quick else command, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        code = f"no result within {limit:.0f} s"
    print(f"    {time.perf_counter() - start:.0f} s, {code or 'done'}", flush=True)
    figures = [asdict(figure) for figure in read_figures(output)] if not code else None
    output.unlink(missing_ok=True)
    return figures


def write_figures(figures: list[Figure], path: Path) -> None:
    path.write_text(json.dumps([asdict(figure) for figure in figures]), encoding="utf-8")


def read_figures(path: Path) -> list[Figure]:
    return [Figure(**values) for values in json.loads(path.read_text(encoding="utf-8"))]


def write(results: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    lines = ["| work | measured | goal |", "|---|---|---|"]
    for figures in results["parts"].values():
        for figure in (Figure(**values) for values in figures):
            goal = figure.goal.replace(">=", "≥").replace("<=", "≤")
            verdict = f"{goal}, {'met' if meets(figure.goal, figure.value) else '**missed**'}" if goal else "–"
            lines.append(f"| {figure.name} | {figure.value:.3g} {figure.unit} | {verdict} |".replace(" |", " |"))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
