"""Time and memory of lock and unlock beside plain copies, on a checkpoint that this script makes.

A 1.7 GB four-shard bf16 checkpoint with the shapes of a small language model (hidden 2048, 16 layers, 32
heads in 8 groups, 5632 rows in the MLP, 32,000 words) is locked and unlocked in turn with `cp -r` and with a
copy in plain Python that hashes (SHA-256) and syncs, interleaved: every round runs each once, in a process of
its own. Ratios are taken in each round; medians over the rounds are printed, as JSON with --json.

    python bench/speed.py --dir /somewhere/with/12GB --layers 16 -n 9
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HIDDEN, HEADS, GROUPS, INTER, WORDS = 2048, 32, 8, 5632, 32000
HEAD_DIM = HIDDEN // HEADS
SHARDS = 4
CHUNK = 4 << 20
TASKS = ("cp", "python-copy", "lock-exact", "lock-gauge", "unlock-exact", "unlock-gauge", "verify-exact")


def config(layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD_DIM,
        "intermediate_size": INTER,
        "vocab_size": WORDS,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
    }


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for n in range(layers):
        at = f"model.layers.{n}."
        out |= {
            at + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            at + "self_attn.k_proj.weight": (GROUPS * HEAD_DIM, HIDDEN),
            at + "self_attn.v_proj.weight": (GROUPS * HEAD_DIM, HIDDEN),
            at + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            at + "mlp.gate_proj.weight": (INTER, HIDDEN),
            at + "mlp.up_proj.weight": (INTER, HIDDEN),
            at + "mlp.down_proj.weight": (HIDDEN, INTER),
            at + "input_layernorm.weight": (HIDDEN,),
            at + "post_attention_layernorm.weight": (HIDDEN,),
        }
    out |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (WORDS, HIDDEN)}
    return out


def make(folder: Path, layers: int) -> Path:
    """Write the checkpoint, random values of about 0.02, unless it is there."""
    import numpy as np

    from unmergeable.checkpoint import build_shard, to_bits

    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    everything = list(shapes(layers).items())
    size = sum(2 * a * (b[0] if b else 1) for _, (a, *b) in everything)
    weight_map: dict[str, str] = {}
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    done = 0
    for name, shape in everything:
        if done >= size * len(groups) / SHARDS:
            groups.append([])
        groups[-1].append((name, shape))
        done += 2 * int(np.prod(shape))
    for k, group in enumerate(groups):
        file = f"model-{k + 1:05d}-of-{len(groups):05d}.safetensors"
        shard = build_shard(file, [(name, "BF16", shape) for name, shape in group], {"format": "pt"})
        with open(folder / file, "wb") as out:
            out.write(shard.header)
            for name, shape in group:
                values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
                out.write(to_bits(values, "BF16").tobytes())
                weight_map[name] = file
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config(layers), indent=2) + "\n")
    return folder


def bench_spec() -> dict[str, Any]:
    """The symmetries of the checkpoint, written out, so that lookups are not part of the figures."""
    sizes = {
        "g": "num_key_value_heads",
        "r": "num_attention_heads // num_key_value_heads",
        "c": "2",
        "a": "head_dim // 2",
        "i": "head_dim",
        "f": "intermediate_size",
    }
    at = "model.layers.{l}."
    q, k, v, o = (f"{at}self_attn.{name}_proj.weight" for name in "qkvo")
    gate, up, down = (f"{at}mlp.{name}_proj.weight" for name in ("gate", "up", "down"))

    def site(
        name: str, kind: str, acts: str, per: list[str], group: str, *slots: tuple[str, str, str, int]
    ) -> Any:
        return {
            "name": at + name,
            "kind": kind,
            "acts": acts,
            "per": per,
            "group": group,
            "sizes": sizes,
            "slots": [
                {"tensor": t, "index": {axis: text}, "power": int(power)} for t, axis, text, power in slots
            ],
        }

    sites = [
        site("self_attn.qk", "qk", "c", ["l", "g", "a"], "complex",
             (q, "0", "g r c a", -1), (k, "0", "g c a", 1)),
        site("self_attn.vo", "vo", "i", ["l", "g"], "general_linear",
             (v, "0", "g i", 1), (o, "1", "g r i", -1)),
        site("mlp", "mlp", "f", ["l"], "monomial",
             (gate, "0", "f", 0), (up, "0", "f", 1), (down, "1", "f", -1)),
        site("self_attn.within", "heads", "r", ["l", "g"], "permutation",
             (q, "0", "g r i", 1), (o, "1", "g r i", 1)),
        site("self_attn.heads", "heads", "g", ["l"], "permutation",
             (q, "0", "g r i", 1), (k, "0", "g i", 1), (v, "0", "g i", 1), (o, "1", "g r i", 1)),
    ]  # fmt: skip
    return {
        "format": 1, "architecture": "bench", "model_type": "bench", "layout": "canonical", "configs": [{}],
        "defaults": {}, "refused": [], "ignored": [], "sites": sites,
        "untouched": ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
                      at + "input_layernorm.weight", at + "post_attention_layernorm.weight"],
    }  # fmt: skip


def plain_copy(src: Path, dst: Path) -> None:
    """What the bar is measured against: read, hash, write, sync."""
    dst.mkdir()
    for path in sorted(src.iterdir()):
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as source, open(dst / path.name, "wb", buffering=0) as target:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                target.write(chunk)
            os.fsync(target.fileno())


def work(task: str, src: Path, dst: Path, spec: Path, jobs: int) -> None:
    """One measured run, in its own process."""
    if task == "make":
        make(src, jobs)
        return
    if task == "python-copy":
        plain_copy(src, dst)
        return
    from unmergeable.derive import Key

    key = Key(bytes(range(32)))
    if task.startswith("unlock"):
        from unmergeable.unlock import unlock

        unlock(src, dst, key=key, jobs=jobs)
    elif task.startswith("lock"):
        from unmergeable.lock import lock
        from unmergeable.spec import Spec

        method = task.partition("-")[2]
        lock(src, dst, key=key, method=method, spec=Spec.from_dict(json.loads(spec.read_text())), jobs=jobs)
    else:
        from unmergeable.spec import Spec
        from unmergeable.verify import verify

        verify(src, dst, run="never", spec=Spec.from_dict(json.loads(spec.read_text())), jobs=jobs)


def run(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds and peak resident memory (MB) of a command."""
    started = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return {
        "seconds": time.monotonic() - started,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss * 1024 / 1e6,
    }


def measure(folder: Path, layers: int, rounds: int, jobs: int, tasks: list[str]) -> dict[str, Any]:
    """All tasks in turn, `rounds` times; destinations are removed between runs."""
    src = folder / f"source-{layers}"
    run([sys.executable, str(Path(__file__).resolve()), "--work", "make", str(src), "-", "-", str(layers)])
    spec = folder / "spec.json"
    spec.write_text(json.dumps(bench_spec()))
    worker = [sys.executable, str(Path(__file__).resolve()), "--work"]
    locked = {method: folder / f"locked-{layers}-{method}" for method in ("exact", "gauge")}
    for method, place in locked.items():
        shutil.rmtree(place, ignore_errors=True)
        if any(task.endswith(method) and not task.startswith("lock") for task in tasks):
            run([*worker, f"lock-{method}", str(src), str(place), str(spec), str(jobs)])
    found: dict[str, list[dict[str, float]]] = {task: [] for task in tasks}
    for number in range(rounds + 1):  # the first warms the cache of the file system and is not counted
        for task in tasks:
            dst = folder / "out"
            shutil.rmtree(dst, ignore_errors=True)
            os.sync()
            if task == "cp":
                result = run(["cp", "-r", str(src), str(dst)])
            else:
                kind, _, method = task.partition("-")
                source = locked[method] if kind == "unlock" else src
                target = locked[method] if kind == "verify" else dst
                result = run([*worker, task, str(source), str(target), str(spec), str(jobs)])
            if number:
                found[task].append(result)
    for place in (folder / "out", *locked.values()):
        shutil.rmtree(place, ignore_errors=True)
    size = sum(path.stat().st_size for path in src.iterdir())
    largest = WORDS * HIDDEN * 2
    report: dict[str, Any] = {
        "layers": layers,
        "bytes": size,
        "largest_tensor": largest,
        "rounds": rounds,
        "tasks": {},
    }
    for task, results in found.items():
        median = {name: statistics.median(r[name] for r in results) for name in results[0]}
        for other in ("cp", "python-copy"):
            if other in found:
                pairs = zip(results, found[other], strict=True)
                median[f"x_{other}"] = statistics.median(r["seconds"] / o["seconds"] for r, o in pairs)
        median["worst_peak_mb"] = max(r["peak_mb"] for r in results)
        report["tasks"][task] = {name: round(value, 3) for name, value in median.items()}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dir", type=Path, help="where to work (default: a temporary folder); sources are kept there"
    )
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("-n", type=int, default=9, help="rounds that count")
    parser.add_argument("-j", "--jobs", type=int, default=2)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--double", action="store_true", help="also with twice the layers, and the ratios")
    parser.add_argument("-o", "--output", type=Path, help="write the JSON there as well")
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        task, src, dst, spec, jobs = args.work
        work(task, Path(src), Path(dst), Path(spec), int(jobs))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tasks = args.tasks.split(",")
        report = {"runs": [measure(folder, args.layers, args.n, args.jobs, tasks)]}
        if args.double:
            report["runs"].append(measure(folder, 2 * args.layers, args.n, args.jobs, tasks))
            one, two = (run["tasks"] for run in report["runs"])
            report["double"] = {
                task: {
                    name: round(two[task][name] / one[task][name], 3)
                    for name in ("seconds", "cpu", "peak_mb")
                }
                for task in tasks
            }
    text = json.dumps(report, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
