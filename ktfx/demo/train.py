"""Trains the demo model, from nothing or further: ``python -m ktfx.demo.train --out DIR --minutes 45``.

The result is an ordinary Hugging Face directory. It is written whole or not at all, at the end and every
``--save-every`` minutes: into a new folder beside DIR first, which then takes DIR's place.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig
from transformers.modeling_utils import PreTrainedModel

from ktfx.demo.corpus import Corpus, build_corpus

BYTES = 256
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
BOS, EOS, PAD = (BYTES + i for i in range(len(SPECIAL_TOKENS)))
VOCABULARY = 264  # a multiple of 8; the ids above the special tokens are reserved
CONTEXT = 512


@dataclass(frozen=True)
class Recipe:
    """How to train. ``minutes`` rules the schedule, so a slow machine ends on time with fewer steps."""

    out: Path
    minutes: float
    start_from: Path | None = None
    length: int = CONTEXT
    batch: int = 4
    peak_rate: float = 3e-3
    warmup: float = 0.02
    weight_decay: float = 0.1
    balance: float = 0.02
    save_every: float = 0.0
    seed: int = 0


def model_config() -> Qwen3MoeConfig:
    """The demo model's shape: four layers, eight experts of which two are chosen, 3.7 million parameters."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=CONTEXT,
        initializer_range=0.04,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    return config


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: the id of a byte is its value, so any text comes back as it was."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_{i}|>" for i in range(VOCABULARY - BYTES - len(SPECIAL_TOKENS))]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in [*SPECIAL_TOKENS, *reserved]])
    bos, eos, pad = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _byte_symbols() -> list[str]:
    """The printable symbol that byte-level tokenizers write for each byte: itself, or the next free one from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    symbols: list[str] = []
    spare = 0x100
    for byte in range(BYTES):
        symbols.append(chr(byte if byte in printable else spare))
        spare += byte not in printable
    return symbols


def token_stream(documents: tuple[str, ...]) -> torch.Tensor:
    """All documents as one int64 row of ids: bos, the bytes, eos, bos, …"""
    ids: list[int] = []
    for document in documents:
        ids += [BOS, *document.encode(), EOS]
    return torch.tensor(ids)


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak; ``progress`` runs from 0 to 1."""
    if progress < recipe.warmup:
        return recipe.peak_rate * progress / recipe.warmup
    along = (progress - recipe.warmup) / (1 - recipe.warmup)
    return recipe.peak_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * min(along, 1.0))) / 2)


def balancing_loss(router_logits: Sequence[torch.Tensor], chosen: int) -> torch.Tensor:
    """How unevenly each layer's experts are used, averaged over layers: 1 if evenly, up to E / chosen.

    router_logits: (tokens, E) a layer. The Switch Transformer's loss (Fedus et al., 2021, eq. 4), layer by layer: taken
    over all layers at once it lets a layer leave experts unused that another one uses.
    """
    total = router_logits[0].new_zeros(())
    for logits_TE in router_logits:
        probability_TE = logits_TE.softmax(-1)
        picked = probability_TE.topk(chosen).indices.flatten()
        share_E = torch.bincount(picked, minlength=logits_TE.shape[-1]) / picked.numel()
        total = total + logits_TE.shape[-1] * (share_E * probability_TE.mean(0)).sum()
    return total / len(router_logits)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, stream: torch.Tensor, length: int = CONTEXT) -> float:
    """Mean cross entropy over the held-out text in windows of ``length``, in nats a byte (no balancing loss)."""
    windows = stream[: len(stream) // length * length].view(-1, length)
    total = 0.0
    for rows in windows.split(16):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return total / (windows.shape[0] * (length - 1))


def train(recipe: Recipe, corpus: Corpus) -> float:
    """Trains, saves to ``recipe.out`` and returns the held-out loss in nats a byte, measured with the saved weights."""
    torch.manual_seed(recipe.seed)
    model = _new_model() if recipe.start_from is None else AutoModelForCausalLM.from_pretrained(recipe.start_from)
    model.set_experts_implementation("eager")  # one dense product an expert: the fastest backward pass on a CPU
    model.float().train()
    stream, held_out = token_stream(corpus.train), token_stream(corpus.held_out)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{count / 1e6:.2f} M parameters, {len(stream) / 1e6:.2f} MB of text, {len(held_out)} bytes held out",
        flush=True,
    )

    start = reported = saved = time.monotonic()
    step, recent, finished = 0, 0.0, False
    chosen = model.config.num_experts_per_tok
    while not finished:
        progress = (time.monotonic() - start) / (60 * recipe.minutes)
        finished = progress >= 1
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, progress)
        first = torch.randint(0, len(stream) - recipe.length, (recipe.batch, 1))
        rows = stream[first + torch.arange(recipe.length)]
        output = model(input_ids=rows, use_cache=False, output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        (loss + recipe.balance * balancing_loss(output.router_logits, chosen)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        recent = loss.item() if step == 1 else 0.98 * recent + 0.02 * loss.item()
        now = time.monotonic()
        if now - reported > 30:
            reported = now
            print(f"{(now - start) / 60:5.1f} min  step {step:5d}  training loss {recent:.3f}", flush=True)
        if recipe.save_every and now - saved > 60 * recipe.save_every:
            saved = now
            save(model, recipe.out, recipe, corpus, held_out)
    return save(model, recipe.out, recipe, corpus, held_out)


def _new_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(model_config())


def save(model: PreTrainedModel, out: Path, recipe: Recipe, corpus: Corpus, held_out: torch.Tensor) -> float:
    """Writes the directory whole; returns the held-out loss of what was written.

    The file holds bfloat16, half of float32's bytes. ``config.json`` says float32, so that it is computed with in
    float32 and greedy output does not hang on the order in which bfloat16 sums were rounded.
    """
    written = _new_model()
    written.load_state_dict({name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    loss = held_out_loss(written.eval(), held_out)
    written.bfloat16()
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        written.generation_config = GenerationConfig(
            bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=200
        )
        written.save_pretrained(beside)
        byte_tokenizer().save_pretrained(beside)
        _edit_json(beside / "config.json", dtype="float32")
        _edit_json(beside / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        notes = {
            "text": "documentation strings of Python's standard library and its help topics (PSF licence)",
            "text_sha256": corpus.digest(),
            "held_out_nats_per_byte": round(loss, 4),
            "minutes": [*_minutes_before(recipe), recipe.minutes],
        }
        (beside / "training.json").write_text(json.dumps(notes, indent=2) + "\n")
        for path in beside.iterdir():
            path.chmod(0o644)
        beside.chmod(0o755)
        _take_place(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    print(f"wrote {out}: {loss:.3f} nats a byte on the held-out text", flush=True)
    return loss


def _minutes_before(recipe: Recipe) -> list[float]:
    """The runs that went into the model this one started from."""
    notes = recipe.start_from / "training.json" if recipe.start_from else None
    return list(json.loads(notes.read_text())["minutes"]) if notes is not None and notes.exists() else []


def _edit_json(path: Path, **values: str) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _take_place(new: Path, out: Path) -> None:
    """Renames ``new`` to ``out``; what stood there is removed afterwards."""
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
    if out.exists():
        os.rename(out, old / out.name)
    os.rename(new, out)
    shutil.rmtree(old)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ktfx.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--minutes", type=float, default=45.0, help="how long to train")
    parser.add_argument("--start-from", type=Path, help="a directory written earlier, to train further")
    parser.add_argument("--length", type=int, default=CONTEXT, help="bytes a training window")
    parser.add_argument("--batch", type=int, default=4, help="windows a step")
    parser.add_argument("--peak-rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--balance", type=float, default=0.02, help="weight of the loss that evens out the experts")
    parser.add_argument("--save-every", type=float, default=0.0, help="minutes between saves; 0: at the end only")
    parser.add_argument("--seed", type=int, default=0)
    recipe = Recipe(**vars(parser.parse_args()))
    train(recipe, build_corpus())


if __name__ == "__main__":
    main()
