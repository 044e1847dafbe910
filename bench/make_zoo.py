r"""Make the embedded zoo of `unmergeable demo`: one base ViT, four fine-tunes of it, their test images.

Everything comes from packages:

    pip install scikit-learn fonttools pillow        # digits.csv.gz is inside scikit-learn
    apt-get install --no-install-recommends dataset-fashion-mnist fonts-agave fonts-anonymous-pro \
        fonts-cantarell fonts-dejavu-core fonts-dejavu-extra fonts-ebgaramond fonts-firacode \
        fonts-freefont-ttf fonts-go fonts-hack fonts-inter fonts-jetbrains-mono fonts-lato \
        fonts-liberation fonts-linuxlibertine fonts-mononoki fonts-noto-mono fonts-oldstandard \
        fonts-open-sans fonts-paratype fonts-play fonts-roboto-unhinted fonts-sil-andika \
        fonts-sil-charis fonts-sil-doulos fonts-sil-gentiumplus fonts-tuffy fonts-vollkorn

    python bench/make_zoo.py --fashion DIR --fonts DIR [--digits FILE] [-o DIR] [--reuse]

    --fashion  the folder of train-images-idx3-ubyte.gz (`dpkg -L dataset-fashion-mnist` names it)
    --fonts    the folder that Debian's fonts packages install into (searched recursively)
    --digits   scikit-learn's datasets/data/digits.csv.gz; found by itself where scikit-learn is installed

The recipe, top to bottom: read the images; train the base on a few images a class of every task, so that
it knows of each task but does none well; fine-tune only its body, one task at a time, under the base's own
frozen head; measure what merges of the fine-tunes can do; write the folders. All fine-tunes start from one
base and their heads never move: they stay in one basin, and task arithmetic works on them.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import ViTConfig, ViTForImageClassification

from zoo_images import (
    FEW_A_CLASS,
    LABELS,
    SIDE,
    TEST_FAMILIES,
    TRAIN_FAMILIES,
    Task,
    batches,
    first_of_each,
    load_tasks,
    pixels,
)

SHOTS = {"fashion": 4, "digits": 1, "latin": 2, "cyrillic": 2}  # what the base sees of each class
BASE_STEPS, BASE_RATE, BASE_BATCH = 800, 1e-3, 128
STEPS = {"fashion": 1000, "digits": 400, "latin": 400, "cyrillic": 400}
RATE, BATCH, REPLAY = 3e-4, 96, 32

ARCHITECTURE = {
    "image_size": SIDE,
    "patch_size": 7,  # 16 patches and the class token: an evaluation costs a third of what patches of 4 cost
    "num_channels": 1,
    "hidden_size": 112,
    "num_hidden_layers": 4,  # wide and shallow merges better than 6 layers of 96
    "num_attention_heads": 4,
    "intermediate_size": 448,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-5,
}

PROTECTED = "fashion"  # what `demo` locks; its full-dose grids are also measured against pairs of others
LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
GRID_IMAGES = 400  # of each task, for the many merges of the full-dose grids
DOSES_PROTECTED = (0.3, 0.5, 0.7, 0.85, 1.0, 1.15)
DOSES_OTHERS = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8)


# ---------------------------------------------------------------- training


def new_model(labels: list[str]) -> ViTForImageClassification:
    """An untrained model with these classes."""
    names = dict(enumerate(labels))
    config = ViTConfig(**ARCHITECTURE, id2label=names, label2id={v: k for k, v in names.items()})
    return ViTForImageClassification(config)


def optimise(
    model: ViTForImageClassification, loss: Callable[[], torch.Tensor], steps: int, lr: float
) -> None:
    """AdamW with warm-up and cosine decay over whatever parameters want a gradient."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(wanted, lr=lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


class Mixture:
    """The base's training data: a few images a class of every task, in batches with an equal share of each.

    Each task's loss is over its own classes only: its rows of the base's head.
    """

    def __init__(self, tasks: dict[str, Task], batch: int, seed: int) -> None:
        self.tasks, self.share, self.streams = tasks, batch // len(tasks), {}
        for name, task in tasks.items():
            few = first_of_each(task.train_labels, SHOTS[name])
            self.streams[name] = batches(task.train[few], task.train_labels[few], self.share, seed)

    def loss(self, body: torch.nn.Module, head: torch.nn.Linear) -> torch.Tensor:
        drawn = [next(stream) for stream in self.streams.values()]
        logits = head(features(body, torch.cat([x for x, _ in drawn]))).split(self.share)
        parts = [
            F.cross_entropy(out[:, task.offset : task.offset + task.classes], y)
            for out, (_, y), task in zip(logits, drawn, self.tasks.values(), strict=True)
        ]
        return torch.stack(parts).mean()


def features(body: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(n, 1, 28, 28) -> (n, width): the last state of the class token, which is what the head sees."""
    return body(x).last_hidden_state[:, 0]


def train_base(tasks: dict[str, Task], seed: int) -> ViTForImageClassification:
    """One model over all classes, on a few images a class."""
    torch.manual_seed(seed)
    model = new_model([f"{name} {label}" for name in tasks for label in LABELS[name]])
    mixture = Mixture(tasks, BASE_BATCH, seed)
    optimise(model, lambda: mixture.loss(model.vit, model.classifier), BASE_STEPS, BASE_RATE)
    return model


def fine_tune(
    base: ViTForImageClassification, tasks: dict[str, Task], name: str, seed: int
) -> ViTForImageClassification:
    """The base's body under this task's rows of the base's head, which stay as they are.

    A quarter of every batch replays the base's own few images, as is done against forgetting. Without it
    a fine-tune wrecks what the others build on and no merge of the four is worth having.
    """
    task, model = tasks[name], new_model(LABELS[name])
    model.vit.load_state_dict(base.vit.state_dict())
    rows = slice(task.offset, task.offset + task.classes)
    model.classifier.weight.data.copy_(base.classifier.weight[rows])
    model.classifier.bias.data.copy_(base.classifier.bias[rows])
    model.classifier.requires_grad_(False)
    mixture = Mixture(tasks, REPLAY, seed)
    stream = batches(task.train, task.train_labels, BATCH, seed)

    def loss() -> torch.Tensor:
        x, y = next(stream)
        return F.cross_entropy(model(x).logits, y) + mixture.loss(model.vit, base.classifier)

    optimise(model, loss, STEPS[name], RATE)
    return model


def rounded(model: ViTForImageClassification) -> ViTForImageClassification:
    """The model as it will be loaded again: through float16, the dtype on disk. All figures are of these."""
    return model.half().float()


# ---------------------------------------------------------------- what merges of them can do


class Bench:
    """Scores bodies on the test images and turns accuracies into values (base 0, fine-tune 1)."""

    def __init__(
        self, tasks: dict[str, Task], models: dict[str, ViTForImageClassification], limit: int | None = None
    ) -> None:
        self.base, self.tasks = models["base"], tasks
        self.body = {name: tensor.clone() for name, tensor in self.base.vit.state_dict().items()}
        self.vectors = {
            name: {key: tensor - self.body[key] for key, tensor in models[name].vit.state_dict().items()}
            for name in tasks
        }
        self.test = {
            name: (pixels(task.test[:limit]), torch.from_numpy(task.test_labels[:limit]))
            for name, task in tasks.items()
        }
        none = self.accuracy({}, list(tasks))
        self.accuracies = {"base": none} | {name: self.accuracy({name: 1.0}, list(tasks)) for name in tasks}

    def accuracy(self, coefficients: dict[str, float], on: list[str]) -> dict[str, float]:
        """Of the base plus so much of each fine-tune's task vector, under the base's frozen heads."""
        merged = {
            key: tensor + sum(c * self.vectors[name][key] for name, c in coefficients.items())
            for key, tensor in self.body.items()
        }
        self.base.vit.load_state_dict(merged)
        scores = {}
        with torch.inference_mode():
            for name in on:
                x, y = self.test[name]
                task = self.tasks[name]
                logits = self.base.classifier(
                    torch.cat([features(self.base.vit, part) for part in x.split(200)])
                )
                guess = logits[:, task.offset : task.offset + task.classes].argmax(1)
                scores[name] = round(float((guess == y).double().mean()), 4)
        self.base.vit.load_state_dict(self.body)
        return scores

    def values(self, coefficients: dict[str, float]) -> dict[str, float]:
        """One value a merged task."""
        scores = self.accuracy(coefficients, list(coefficients))
        bottom = self.accuracies["base"]
        return {
            name: round((score - bottom[name]) / (self.accuracies[name][name] - bottom[name]), 3)
            for name, score in scores.items()
        }

    def task_arithmetic(self, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
        """lambda -> values, for the base plus lambda times the sum of the task vectors."""
        return {str(c): self.values(dict.fromkeys(names, c)) for c in LAMBDAS}

    def full_dose(self, protected: str, others: tuple[str, ...]) -> list[dict[str, float]]:
        """The full-dose grid: a times the protected vector plus b times the sum of the others.

        Each row: a, b, the protected task's value, and `own`, the least value of the thief's own tasks.
        """
        rows = []
        for a, b in itertools.product(DOSES_PROTECTED, DOSES_OTHERS):
            got = self.values({protected: a} | dict.fromkeys(others, b))
            rows.append({"a": a, "b": b, "protected": got[protected], "own": min(got[o] for o in others)})
        return rows


def measure(tasks: dict[str, Task], models: dict[str, ViTForImageClassification]) -> dict[str, object]:
    """All figures of zoo.json, printed on the way."""
    bench, facts, line = Bench(tasks, models), {}, "{:<28}" + "{:>10}" * len(tasks)
    print("\naccuracy on the test images")
    print(line.format("", *tasks))
    for name, scores in bench.accuracies.items():
        print(line.format(name, *(f"{score:.3f}" for score in scores.values())))
    for name, task in tasks.items():
        low, high = bench.accuracies["base"][name], bench.accuracies[name][name]
        error = ((low * (1 - low) + high * (1 - high)) / len(task.test)) ** 0.5
        facts[name] = {"base": low, "fine_tuned": high, "standard_error": round(error, 4)}
        facts[name] |= {"classes": task.classes, "train": len(task.train), "test": len(task.test)}
        facts[name] |= {"base_saw_a_class": SHOTS[name], "margin_in_errors": round((high - low) / error, 1)}
    print("\ntask arithmetic: value of every merged task (base 0, fine-tune 1) at the best lambda")
    arithmetic = {}
    sets = itertools.chain.from_iterable(itertools.combinations(tasks, k) for k in range(2, len(tasks) + 1))
    for names in sets:
        grid = arithmetic["+".join(names)] = bench.task_arithmetic(names)
        best = max(grid, key=lambda c: min(grid[c].values()))
        print(
            f"{'+'.join(names):<32} lambda {best}  "
            + "  ".join(f"{n} {v:.2f}" for n, v in grid[best].items())
        )
    print(f"\nfull-dose grid on the first {GRID_IMAGES} images of each task: value of the protected one,")
    print("and `own`, the least value of the thief's own tasks")
    grid_bench = Bench(tasks, models, GRID_IMAGES)
    print(f"{'protected | others':<36}{'best for both':>26}{'most of protected at own >= .25':>34}")
    doses = {}
    for protected in tasks:
        rest = [name for name in tasks if name != protected]
        pairs = itertools.combinations(rest, 2) if protected == PROTECTED else ()
        for others in (*pairs, tuple(rest)):
            rows = doses[f"{protected}|{'+'.join(others)}"] = grid_bench.full_dose(protected, others)
            both = max(rows, key=lambda row: min(row["protected"], row["own"]))
            most = max(rows, key=lambda row: (row["own"] >= 0.25, row["protected"]))
            cells = [f"a {r['a']} b {r['b']}: {r['protected']:.2f}, {r['own']:.2f}" for r in (both, most)]
            print(f"{protected + ' | ' + '+'.join(others):<36}{cells[0]:>26}{cells[1]:>34}", flush=True)
    return {"accuracies": bench.accuracies, "tasks": facts, "task_arithmetic": arithmetic, "full_dose": doses}


# ---------------------------------------------------------------- writing


def write_models(folder: Path, models: dict[str, ViTForImageClassification]) -> None:
    for name, model in models.items():
        model.half().save_pretrained(folder / "models" / name)
        model.float()


def write_data(folder: Path, tasks: dict[str, Task]) -> None:
    """One npz a task: test_images, test_labels, few_images, few_labels; labels as uint8."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, task in tasks.items():
        few = first_of_each(task.train_labels, FEW_A_CLASS)
        np.savez_compressed(
            folder / "data" / f"{name}.npz",
            test_images=task.test,
            test_labels=task.test_labels.astype(np.uint8),
            few_images=task.train[few],
            few_labels=task.train_labels[few].astype(np.uint8),
        )


def find_digits() -> Path | None:
    """scikit-learn's file, without importing scikit-learn."""
    spec = importlib.util.find_spec("sklearn")
    return Path(spec.origin).parent / "datasets/data/digits.csv.gz" if spec and spec.origin else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options]"
    )
    home = Path(__file__).parents[1] / "src/unmergeable/zoo"
    parser.add_argument("--fashion", type=Path, required=True, help="folder of Fashion-MNIST's .gz files")
    parser.add_argument("--fonts", type=Path, required=True, help="folder of the fonts")
    parser.add_argument("--digits", type=Path, default=find_digits(), help="digits.csv.gz")
    parser.add_argument("-o", "--output", type=Path, default=home, help="default: the package's zoo/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--reuse", action="store_true", help="train only the models that OUTPUT lacks (give the same seed)"
    )
    args = parser.parse_args()
    if args.digits is None:
        parser.error("scikit-learn is not installed here: give --digits")
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)

    started = time.perf_counter()
    tasks = load_tasks(args.fashion, args.fonts, args.digits, args.seed)
    print(f"images read in {time.perf_counter() - started:.0f} s", flush=True)
    models: dict[str, ViTForImageClassification] = {}
    reused: list[str] = []
    for name in ("base", *tasks):
        if args.reuse and (args.output / "models" / name).is_dir():
            model = ViTForImageClassification.from_pretrained(args.output / "models" / name)
            reused.append(name)
        elif name == "base":
            model = train_base(tasks, args.seed)
        else:
            model = fine_tune(models["base"], tasks, name, args.seed + 1)
        models[name] = rounded(model).requires_grad_(False)
        print(f"{name} ready after {time.perf_counter() - started:.0f} s", flush=True)

    figures = measure(tasks, models)
    write_models(args.output, models)
    write_data(args.output, tasks)
    report = {
        "format": 1,
        "command": "python bench/make_zoo.py --fashion DIR --fonts DIR --digits FILE",
        "reused": reused,  # models that an earlier run with the same seed and steps had trained
        "seed": args.seed,
        "steps": {"base": BASE_STEPS, **STEPS},
        "parameters": {name: model.num_parameters() for name, model in models.items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: version(name) for name in ("transformers", "numpy", "pillow", "fonttools")},
        "full_dose_images": GRID_IMAGES,
        "fonts": {"train": TRAIN_FAMILIES, "test": TEST_FAMILIES},
        **figures,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (args.output / "zoo.json").write_text(text + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    print(f"\n{args.output}: {size / 1e6:.2f} MB, {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
