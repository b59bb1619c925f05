"""Advantage-weighted supervised fine-tuning on two conversations, number by number.

    python examples/weighted_sft.py
    python examples/weighted_sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Needs no network by default: a GPT-2 with random weights, small but with GPT-2's vocabulary size, and a
word-level tokenizer made on the spot. `--model` takes a checkpoint directory or a hub id instead.
"""

from __future__ import annotations

import argparse
import re
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from trainer import compute_advantage_weighted_sft_loss

CONVERSATIONS = (
    "User: What is 2+2?\nAssistant: 2+2 equals 4.",
    "User: Where is the Eiffel Tower?\nAssistant: It stands in central Paris.",
)
MASKED_TOKENS = 8  # the user's turn of both conversations
SHOWN = 5  # values printed of a longer tensor


def tokenize_without_network() -> tuple[Tensor, Tensor]:
    """Tokenize by words, and end each conversation with GPT-2's end-of-text token.

    Returns:
        Token ids ``[2, 18]``, and which of them are real (all).
    """
    end_of_text = GPT2Config().eos_token_id
    words = [re.findall(r"\w+|[^\w ]", text) for text in CONVERSATIONS]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(chain.from_iterable(words)))}
    input_ids = torch.tensor([[*(vocabulary[word] for word in row), end_of_text] for row in words])
    return input_ids, torch.ones_like(input_ids)


def tokenize_with(name: str) -> tuple[Tensor, Tensor]:
    """Tokenize with a model's own tokenizer, padded on the right.

    Returns:
        Token ids ``[2, T]``, and which of them are real.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(list(CONVERSATIONS), padding=True, padding_side="right", return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def small_random_gpt2() -> PreTrainedModel:
    """A GPT-2 of two narrow layers: 3.3M parameters, made in a moment."""
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=64))


def numbers(values: Tensor) -> str:
    """The first few values of a tensor, readable (adding 0.0 turns -0.0 into 0.0)."""
    return "[" + ", ".join(f"{value + 0.0:.2f}" for value in values[:SHOWN].tolist()) + "]"


def show_the_steps(model: PreTrainedModel, input_ids: Tensor, advantages: Tensor, loss_mask: Tensor) -> None:
    """Print what happens inside the loss: the same arithmetic, in the open."""
    with torch.no_grad():
        logits = model(input_ids=input_ids).logits[..., :-1, :].flatten(0, 1)
    labels = input_ids[..., 1:].flatten()
    weights, mask = advantages[..., :-1].flatten(), loss_mask[..., :-1].flatten()
    cross_entropy = functional.cross_entropy(logits, labels, reduction="none")
    weighted = cross_entropy * weights * mask
    print(f"  Flattened logits shape: {logits.shape}")
    print(f"  Valid tokens: {mask.sum().item()}  (unmasked, after the shift by one)")
    for first in (0, MASKED_TOKENS):
        where = slice(first, first + SHOWN)
        print(f"  Predictions of tokens {first + 1} to {first + SHOWN} of the first conversation:")
        print(f"    Token-level CE loss (sample): {numbers(cross_entropy[where])}")
        print(f"    Advantages (sample):          {numbers(weights[where])}")
        print(f"    Loss mask (sample):           {numbers(mask[where])}")
        print(f"    Weighted loss (sample):       {numbers(weighted[where])}")
    print(f"  Sum {weighted.sum().item():.4f} / {mask.sum().item()} valid tokens")


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint directory or hub id (default: a small random GPT-2)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random weights and advantages (default: 0)"
    )
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    print("ADVANTAGE-WEIGHTED SFT DEMO")
    print("=" * 55)
    print("Given:   a batch of tokens, advantages, loss masks (same shape)")
    print("Compute: token-level cross-entropy (CE) scaled by advantages")
    print("Output:  one number, ready for backward()")
    print()
    print(
        f"Model: {arguments.model or 'a small GPT-2 with random weights: expect a CE near ln(50257) = 10.82'}"
    )
    if arguments.model:
        input_ids, is_real = tokenize_with(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
    else:
        input_ids, is_real = tokenize_without_network()
        model = small_random_gpt2()
    model.eval()  # without dropout, so that the steps shown are the steps taken

    advantages = 0.5 + 0.5 * torch.randn(input_ids.shape)
    loss_mask = is_real.float()  # padding is never trained
    loss_mask[:, :MASKED_TOKENS] = 0.0

    print(f"Sample conversation: {CONVERSATIONS[0]!r}")
    print(f"Sample tokens:       {input_ids[0].tolist()}")
    print(f"Sample loss mask:    {loss_mask[0].int().tolist()}")
    print()
    print("COMPUTING THE LOSS")
    print("=" * 55)
    print(f"  Input tokens shape: {input_ids.shape}")
    print(f"  Advantages shape: {advantages.shape}")
    print(f"  Loss mask shape: {loss_mask.shape}")
    show_the_steps(model, input_ids, advantages, loss_mask)

    loss = compute_advantage_weighted_sft_loss(
        model, input_ids=input_ids, advantages=advantages, loss_mask=loss_mask
    )
    print(f"  Final loss: {loss.item():.4f}")
    print()
    print(f"Loss requires grad: {loss.requires_grad}")
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    gradient_norm = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients]))
    print(f"loss.backward() done: {len(gradients)} tensors have gradients, gradient norm {gradient_norm:.4f}")


if __name__ == "__main__":
    main()
