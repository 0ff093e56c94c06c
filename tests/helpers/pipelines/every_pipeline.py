"""Pipelines of diffusers, tiny and random, built from a table of sizes: `every_pipeline.json`.

The table holds `parts` (a class and what its config has that is not the default, by number), `pipelines` (the parts by
the names that the class takes, and the arguments of a call) and `unbuilt` (a reason by class). Nothing is fetched; what
a tokenizer of files would do, `Letters` does.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import tiny_pipelines as tiny
import torch
import transformers

TABLE: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())
MADE_FOR = TABLE["diffusers"]


class Letters:
    """A tokenizer of letters: `input_ids` and `attention_mask`, padded with 0, ended with 1."""

    model_max_length, padding_side, vocab_size, chat_template = 77, "right", 900, None
    pad_token, eos_token, bos_token, unk_token_id = "<pad>", "</s>", "<s>", 0
    pad_token_id, eos_token_id, bos_token_id = 0, 1, 2
    added_tokens_encoder: Mapping[str, int] = {}
    fix_text = staticmethod(str)  # as ftfy has it, which prompts of some pipelines go through first

    def __call__(
        self, text: Any = None, padding: Any = None, max_length: int | None = None, return_tensors: Any = None, **_: Any
    ) -> Any:
        texts = [text] if isinstance(text, str) else list(text)
        ids = [[*(3 + ord(letter) % 80 for letter in str(each)[:160]), 1][:max_length] for each in texts]
        width = max(map(len, ids)) if padding else None
        width = (max_length or self.model_max_length) if padding == "max_length" else width
        masks = [[1] * len(row) + [0] * ((width or 0) - len(row)) for row in ids]
        found = {
            "input_ids": [row + [0] * (len(mask) - len(row)) for row, mask in zip(ids, masks, strict=True)],
            "attention_mask": masks,
        }
        if return_tensors:
            return transformers.BatchEncoding({name: torch.tensor(rows) for name, rows in found.items()})
        return transformers.BatchEncoding(found)

    def tokenize(self, text: str) -> list[str]:
        return list(text)

    def decode(self, ids: Any, **_: Any) -> str:
        return "a"

    def batch_decode(self, ids: Any, **_: Any) -> list[str]:
        return ["a"] * len(ids)

    def apply_chat_template(self, messages: Any, tokenize: bool = False, **how: Any) -> Any:
        if not tokenize:
            return "chat" if isinstance(messages[0], dict) else ["chat"] * len(messages)
        found = self("chat", padding="max_length", max_length=how.get("max_length", 20), return_tensors="pt")
        if how.get("return_dict"):
            return found
        return found["input_ids"] if how.get("return_tensors") else found["input_ids"][0].tolist()

    def convert_tokens_to_ids(self, token: str) -> int:
        return 5


class Reader(Letters):
    """A processor of texts and pictures, as Qwen's: each picture is 16 patches of noise, which come to 4 tokens."""

    image_token_id, picture = 151655, [151652, *4 * [151655], 151653]

    def __call__(self, text: Any = None, images: Any = None, **how: Any) -> Any:
        found = super().__call__(text, **how)
        count = len(images) if isinstance(images, (list, tuple)) else int(images is not None)
        if count:
            patches = torch.rand(16 * count, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(5))
            found |= {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}
            seen = torch.tensor(self.picture * count).expand(len(found["input_ids"]), -1)
            found["input_ids"] = torch.cat([found["input_ids"], seen], dim=1)
            found["attention_mask"] = torch.cat([found["attention_mask"], torch.ones_like(seen)], dim=1)
        return found


class Unguarded:
    """A guardrail that lets everything pass, for pipelines that do not run without one."""

    def to(self, *_: Any) -> Unguarded:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def names() -> list[str]:
    """All pipeline classes that diffusers exports, deprecated ones among them."""
    return sorted(name for name in dir(diffusers) if _is_pipeline(name))


def _is_pipeline(name: str) -> bool:
    try:
        kind = getattr(diffusers, name)
        return isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)
    except (ImportError, AttributeError, RuntimeError):  # it needs a package that is not here
        return False


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and the arguments of a call for `argument` to make."""
    row = TABLE["pipelines"][name]
    torch.manual_seed(0)
    kind = getattr(diffusers, name)
    vars(sys.modules[kind.__module__]).setdefault("ftfy", Letters)
    return tiny.quiet(kind(**{slot: part(number) for slot, number in row["parts"].items()})), row["call"]


def part(number: Any) -> Any:
    """A component by its number in the table; None, lists of components and plain settings as they are."""
    if isinstance(number, list):
        return [part(each) for each in number]
    return make(TABLE["parts"][number]) if isinstance(number, str) and number.startswith("#") else number


def make(spec: dict[str, Any]) -> Any:
    own = {"Letters": Letters, "Reader": Reader, "Unguarded": Unguarded, "tokenizer": _clip_tokenizer}
    if spec["class"] in own:
        return own[spec["class"]]()
    module = {"diffusers": diffusers, "transformers": transformers}.get(spec["of"])
    module = module or importlib.import_module(spec["of"])
    kind = getattr(module, spec["class"])
    if "kind" not in spec:
        return _evaluating(kind(**spec["config"]))
    config = getattr(module, spec["kind"], None) or getattr(transformers, spec["kind"])
    return _evaluating(kind(config(**spec["config"])))


def _clip_tokenizer() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 77  # which some priors count on
    return tokenizer


def _evaluating(component: Any) -> Any:
    """Modules with weights that are not 0: what would come out alike whatever went in shows nothing."""
    if not isinstance(component, torch.nn.Module):
        return component
    for parameter in component.parameters():
        if parameter.is_floating_point() and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return component.eval()


def argument(value: Any) -> Any:
    """What the table writes for a tensor, a picture or a generator; everything else as it is."""
    if isinstance(value, list):
        return [argument(each) for each in value]
    if not isinstance(value, dict):
        return value
    generator = torch.Generator().manual_seed(5)
    if "generator" in value:
        return generator
    if "picture" in value:
        width, height = value["picture"]
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        return PIL.Image.fromarray(pixels.numpy()).convert(value["mode"])
    if "ints" in value:
        return torch.randint(0, value["high"], value["ints"], generator=generator).to(getattr(torch, value["dtype"]))
    if "array" in value:
        return np.asarray(torch.rand(value["array"], generator=generator).numpy())
    if "mapping" in value:
        return {key: argument(each) for key, each in value["mapping"].items()}
    return torch.rand(value["tensor"], generator=generator)


def numbers(output: Any) -> torch.Tensor:
    """Everything of a pipeline's first output in one row, float64."""
    first = output.to_tuple()[0] if hasattr(output, "to_tuple") else output[0] if isinstance(output, tuple) else output
    return torch.cat(list(_flat(first)))


def _flat(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _flat(each)
    elif value is not None:
        array = value.detach() if isinstance(value, torch.Tensor) else np.asarray(value)
        yield torch.as_tensor(array).double().flatten()
