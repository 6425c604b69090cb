"""Tiny transformers made from a config, and the text that they learn: a bundled one."""

from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine

from umbel import Examples

LENGTH = 32
SIZE = 128


def classifier() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=SIZE, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=256, max_position_embeddings=LENGTH, num_labels=2,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def writer() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=LENGTH,
            bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def texts() -> list[str]:
    """What scikit-learn says of two kinds of data: plants and patients; images and wine."""
    found = [
        load_breast_cancer().DESCR + load_iris().DESCR,
        load_digits().DESCR + load_wine().DESCR,
    ]
    return [text.encode("ascii", "replace").decode().lower() for text in found]


def windows(text: str, step: int) -> "np.ndarray[Any, Any]":
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    return np.stack([ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH, step)])


def stories() -> "np.ndarray[Any, Any]":
    """All the text in windows of 32 characters, one after the other."""
    return np.concatenate([windows(text, LENGTH) for text in texts()])


def digits_or_words() -> Examples:
    """Windows by what they hold: numbers (tables) or words only."""
    x = np.concatenate([windows(text, 8) for text in texts()])
    number = (x >= ord("0")) & (x <= ord("9"))
    return Examples(x, number.any(1).astype(np.int64))
