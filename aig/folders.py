"""Model folders: a trained network to give away, in the convention of the Hugging Face Hub.

    python -m aig.export --resume runs/NAME --folder DIR

    DIR/model.safetensors     the weights
    DIR/config.json           structure, classes, normalisation, thresholds, the flags of the training
    DIR/test.json             what `--test` measured of the run, as in its folder
    DIR/README.md             the model card, written from the run's own files

`aig.load(DIR)` gives the network, bit for bit, and so does `aig.load("OWNER/NAME")` once the folder is on the Hub.
Everything that takes a checkpoint takes a model folder.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes

import aig
from aig.checkpoint import BEST, CHECKPOINT, CONFIG, TEST, TRAINED, WEIGHTS, checkpoint_in, load_checkpoint, recorded
from aig.console import ESCAPED, InputError
from aig.inference import Macs, count_macs
from aig.networks import architecture, budgets_of, digest, fetched, results_of
from aig.runs import ARGS, atomic_write, make_folder, read_json, write_json
from aig.runtime import PROGRAM
from convnet_aig import AdaptiveResNet, check_thresholds, is_one

CARD = "README.md"
PATHS = ("data", "pretrained", "distill", "save")  # flags that name a place on somebody's machine


def save(
    model: AdaptiveResNet,
    folder: str | Path,
    run: str | Path | None = None,
    licence: str = "",
    overwrite: bool = False,
) -> None:
    """Writes a model folder.

    Args:
        model: as `aig.load` gives it: with `classes`, `preprocess` and the thresholds to be kept.
        folder: to write; it may exist.
        run: the run folder or checkpoint that the model is from. Its flags and test results go into the card.
        licence: of the weights, as the Hub names it, such as "mit".
        overwrite: replace the files if they are there.

    Raises:
        ValueError: if the model has no `classes` or `preprocess`, or other weights than the run.
        InputError: if the files exist already, the folder is that of a run, or the run cannot be read.
    """
    folder = Path(folder)
    for name in ("classes", "preprocess"):
        if not hasattr(model, name):
            raise ValueError(f"a network without `{name}` cannot be used by others: set it, as aig.load does")
    if len(model.classes) != model.linear.out_features:
        raise ValueError(f"{len(model.classes)} classes are named, but the network has {model.linear.out_features}")
    if any((folder / name).exists() for name in (BEST, CHECKPOINT)):
        raise InputError(f"{folder} is the folder of a run: choose another one")
    there = [name for name in (WEIGHTS, CONFIG, CARD, TEST) if (folder / name).exists()]
    if there and not overwrite:
        raise InputError(f"{folder} holds a {there[0]} already: add --overwrite, or choose another folder")
    file = checkpoint_in(fetched(run), *TRAINED) if run else None
    checkpoint = load_checkpoint(file) if file else {}
    own = {key: value.cpu() for key, value in model.state_dict().items()}
    if any(not torch.equal(own[key], value) for key, value in checkpoint.get("state_dict", {}).items() if key in own):
        raise ValueError(f"the network is not that of {file}, whose results would be quoted")
    config = describe(model, file, checkpoint, licence)
    json.dumps(config)  # what cannot be written is an error while the folder is as it was
    now = {"checkpoint": WEIGHTS, "weights": digest(own)}
    results = {key: {**result, **now} for key, result in results_of(file, checkpoint).items()} if file else {}
    text = card(folder.resolve().name, config, count_macs(model, model.preprocess.size), results)
    text, weights = text.encode(errors=ESCAPED), to_bytes({key: value.contiguous() for key, value in own.items()})
    make_folder(folder, "the model folder")
    (folder / CONFIG).unlink(missing_ok=True)  # without it the folder does not load until all is written
    with atomic_write(folder / WEIGHTS) as target:
        target.write(weights)
    (folder / TEST).unlink(missing_ok=True)  # of another network
    if results:
        write_json(folder / TEST, results)
    with atomic_write(folder / CARD) as target:
        target.write(text)
    write_json(folder / CONFIG, config)


def describe(model: AdaptiveResNet, file: Path | None, checkpoint: dict[str, Any], licence: str) -> dict[str, Any]:
    """What config.json says of a network, and of the checkpoint that it is from."""
    how, own = model.preprocess, recorded(checkpoint)
    run = read_json(file.with_name(ARGS)) if file else {}
    training = {name: run[name] for name in ("commands", "hardware", "versions") if name in run}
    thresholds = check_thresholds(model.threshold, model.num_gates)
    config = {
        "library_name": PROGRAM,
        "library_version": aig.__version__,
        "architecture": architecture(model),
        "classes": list(model.classes),
        "image_size": how.size,
        "mean": list(how.mean),
        "std": list(how.std),
        "photographs": how.photographs,
        "threshold": float(model.threshold) if is_one(model.threshold) else thresholds,
        "budgets": budgets_of(file, checkpoint) if file else {},
        "training": training or own.get("training", {}),
        "licence": licence or own.get("licence", ""),
    }
    no_flags = {*config, "epochs_done"}
    flags = {name: value for name, value in own.items() if name not in no_flags and not isinstance(value, dict)}
    flags |= {name: unplaced(value) for name, value in flags.items() if name in PATHS}
    trained = {"epochs_done": checkpoint["epoch"] - 1} if isinstance(checkpoint.get("epoch"), int) else {}
    return {**config, **trained, "flags": flags}


def unplaced(value: Any) -> Any:
    """An absolute path as its last part: the rest says nothing on another machine."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


# ---------------------------------------------------------------------------------------------- the card


def card(name: str, config: dict[str, Any], cost: Macs, results: dict[str, dict[str, Any]]) -> str:
    """The model card, in Markdown, with the header that the Hub reads."""
    structure, size, gated = config["architecture"], config["image_size"], sum(config["architecture"]["gated"])
    what = "A plain ResNet, as a teacher or baseline for networks with gates."
    gates, cost_of_gates = "", ""
    if gated:
        what = (
            "A ResNet whose every residual block has a small gate that decides, image by image, whether the block runs "
            "(Veit and Belongie, *Convolutional networks with adaptive inference graphs*, ECCV 2018)."
        )
        many, budgets = isinstance(config["threshold"], Sequence), ", ".join(config["budgets"])
        threshold = "a threshold for each gate" if many else f"the threshold {config['threshold']:g}"
        kept = f"; thresholds are kept for the budgets {budgets}" if budgets else ""
        gates = f"- **Gates**: open where P(open) is above {threshold}{kept}.\n"
        cost_of_gates = f"; the gates take {sum(cost.gates) / 1e6:.3f} M more"
    # a string of JSON is one of YAML, too
    licence = f"license: {json.dumps(config['licence'].lower())}\n" if config["licence"] else ""
    mean, std = (f"({', '.join(f'{value:.4f}' for value in config[name])})" for name in ("mean", "std"))
    classes = [html.escape(each) for each in config["classes"][:20]] + ["..."] * (len(config["classes"]) > 20)
    return f"""\
---
library_name: {PROGRAM}
{licence}pipeline_tag: image-classification
tags: [conditional-computation, adaptive-inference-graph]
---

# {name}

{what}

```python
import aig
from PIL import Image

net = aig.load("{name}")  # this folder
logits, gates = net(net.preprocess(Image.open("image.jpg"))[None])
print(net.classes[logits.argmax()], [int(z) for z in gates])  # gates: 1 for each block that ran
```

- **Network**: {structure["network"]} of {sum(structure["stages"])} {structure["block"]}s \
({" + ".join(map(str, structure["stages"]))} by stage), {gated or "none"} of them with a gate; \
{structure["parameters"]:,} parameters.
- **Computation**: {cost.dense / 1e6:.2f} M multiply-accumulates per image if every branch runs{cost_of_gates}.
- **Input**: RGB, {size} x {size} pixels, scaled to [0, 1], mean {mean}, std {std}.
{gates}- **Classes** ({len(config["classes"])}): {", ".join(classes)}.
- **Licence**: {html.escape(config["licence"]) or "not stated"}.

{training(config)}{accuracies(results, config)}

{limits(config["flags"])}
"""


def training(config: dict[str, Any]) -> str:
    """How it was trained, and how to do so again; nothing without the run's commands."""
    environment = config["training"]
    if not environment.get("commands"):
        return ""
    commands = [f"    {'' if line.startswith('python') else 'python '}{line}" for line in environment["commands"]]
    weights = [f"The weights are those after epoch {config['epochs_done']}.", ""] if "epochs_done" in config else []
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    machine = f"On {environment.get('hardware', 'unknown hardware')}; {versions}."
    return "\n".join(["## Training", "", *commands, "", *weights, machine, "", ""])


def accuracies(results: dict[str, dict[str, Any]], config: dict[str, Any]) -> str:
    """What `--test` measured, as a table. Raises InputError if results are not complete."""
    if not results:
        return "## Accuracy\n\nNot measured with `--test`."
    first, gated = next(iter(results.values())), any(config["architecture"]["gated"])
    tops = [name for name in ("top1", "top5") if name in first]
    titles = ["gate mode", *(f"top-{name[3:]}, %" for name in tops), "blocks run", "multiply-accumulates", "images"]
    titles.append("threshold")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    try:
        for key, result in results.items():
            values = [f"{result[name]:.2f}" for name in tops]
            if "top1_std" in result:
                values[0] += f" ± {result['top1_std']:.2f}"
            values += [f"{result['execution_rate']:.3f}", f"{result['macs_fraction']:.3f}", f"{result['images']:,}"]
            threshold = result["threshold"] if key.startswith("argmax") and gated else "–"
            values.append("one per gate" if isinstance(threshold, list) else str(threshold)[:6])
            lines.append(f"| `{key}` | {' | '.join(values)} |")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the test results in {TEST} are damaged ({error!r}): move them away") from error
    where = unplaced(first.get("data") or config["flags"].get("data")) or "the training's data set"
    modes = [
        "", "`argmax` opens a gate where P(open) is above a threshold; `argmax@budget=B` at thresholds chosen for a "
        "budget, on training images; `sample` draws, as the authors' code does; `expected` and `all` run every block. "
        "`+bn`: with BatchNorm's statistics estimated anew in that mode.",
    ]
    return "\n".join([
        "## Accuracy", "",
        f"On the test images of `{where}`, by `--test`. Blocks run are a fraction of all, multiply-accumulates (gates "
        "included) of the dense net's.", "", *lines, *(modes if gated else []),
    ])


def limits(flags: dict[str, Any]) -> str:
    """What it is not for."""
    lines = [
        "## Limits", "",
        "- It puts every picture into one of its classes, and its confidence is not calibrated.",
        "- This card says nothing about its accuracy against attacks, or on images of another kind.",
    ]
    if epochs := flags.get("epochs"):
        lines.append(f"- One training (epochs planned: {epochs}, seed {flags.get('seed')}) does not show how much "
                     "results vary.")
    if not flags.get("val_size") and flags:
        lines.append("- No training images were held out: while it trained, it was validated on the test images.")
    return "\n".join(lines)
