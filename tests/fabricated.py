"""Run folders in the format that training writes, with invented numbers: for tests of the comparison only."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from experiments.collect import write_notes
from experiments.results import Cost, Row

HEADER = "step,epoch,lr,train_loss,test_loss,top1,top5,images_per_second,peak_mib,seconds"
FAMILIES = {"original": "batch", "group": "group", "kernel": "kernel"}


def run_folder(out: Path, *, model="cifar_resnet8", norm="original", batch_size=2, seed=0, top1=97.5, epochs=3, **more):
    """Write one finished run; `more` replaces keys of `run.json`, e.g. status="failed"."""
    folder = out / f"{model}-{norm}-b{batch_size}-s{seed}"
    folder.mkdir(parents=True)
    record = {"parameters": 78042, "classes": 10, "train_images": 1438, "test_images": 359, "status": "finished"} | more
    steps = epochs * (record["train_images"] // batch_size)
    run = {"recipe": record.pop("recipe", "digits"), "model": model, "norm": norm, "batch_size": batch_size}
    record["run"] = run | {"seed": seed, "epochs": epochs, "lr": batch_size / 640, "dropout": None}
    record["environment"] = {"device": "cpu", "torch": "2.15.0"}
    result = {"top1": top1, "top5": 99.9, "best_top1": top1 + 0.1, "test_loss": 0.081, "train_loss": 0.0312}
    record.setdefault("result", result | {"steps": steps, "epochs": epochs, "seconds": 21.34})
    (folder / "run.json").write_text(json.dumps(record))
    rising = [(e, top1 if e == epochs else top1 * (1 - 0.6 ** (e + 1))) for e in range(1, epochs + 1)]
    lines = [f"{steps * e // epochs},{e},0.01,{1 / e:.3f},{1 / e:.3f},{t:.2f},99,812.4,,{3 * e}" for e, t in rising]
    (folder / "log.csv").write_text("\n".join([HEADER, *lines]) + "\n")
    return folder


def comparison(out: Path, accuracies: dict[tuple[str, int], float], *, seeds=(0, 1), sd=0.3, **more) -> Path:
    """Run folders for {(norm, batch size): accuracy}, with costs and the command noted."""
    noise = random.Random(0)
    rows, costs = [], {}
    for (norm, batch_size), accuracy in accuracies.items():
        for seed in seeds:
            top1 = accuracy + noise.gauss(0, sd)
            run_folder(out, norm=norm, batch_size=batch_size, seed=seed, top1=top1, epochs=3 + (batch_size > 2), **more)
            key = {"model": more.get("model", "cifar_resnet8"), "norm": norm, "batch_size": batch_size, "seed": seed}
            rows.append(Row(recipe=more.get("recipe", "digits"), command="python -m experiments compare ...", **key))
        costs[f"{rows[-1].model} {norm} {batch_size}"] = cost(norm)
    write_notes(out, rows, costs)
    return out


def cost(norm: str) -> Cost:
    """An invented cost, slower for kernel normalization."""
    ratio = {"original": 1.0, "group": 0.9, "kernel": 2.1}[norm]
    time = {"ms_per_step": 10 * ratio, "ms_per_step_q20": 9.5 * ratio, "ms_per_step_q80": 11.25 * ratio}
    slow = {"slowdown": ratio, "slowdown_q20": ratio, "slowdown_q80": ratio * 1.1}
    static = {"parameters": 78042, "macs": 789_504, "saved_mib": 3.2 * ratio, "peak_mib": 5.6 * ratio}
    return Cost(norm_family=FAMILIES[norm], cost_device="cpu", **time, **slow, **static)


def words_of(page: str) -> str:
    """A page's text, without the tags inside of words and names."""
    return re.sub(r"<wbr>|</?span[^>]*>", "", page)
