"""Text in Hugging Face: run it with `python -m umbel.examples.frameworks.transformers_text`."""

import numpy as np
from sklearn.datasets import load_breast_cancer

import umbel
from umbel import Examples, Federation, Split, TransformersTrainer


def net():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def data(node, options):  # noqa: ARG001
    text = load_breast_cancer().DESCR.encode("ascii", "replace")  # a character is a token
    x = np.frombuffer(text, np.uint8)[: len(text) // 32 * 32].reshape(-1, 32).astype(np.int64)
    mine = x[node.partition :: node.partitions]
    return Split(Examples(mine[1:], mine[1:]), Examples(mine[:1], mine[:1]))


federation = Federation(
    trainer=TransformersTrainer(net),
    data=data,
    options={"rounds": 10, "learning-rate": 0.1, "momentum": 0.9, "batch-size": 4},
    name="text-transformers",
)

if __name__ == "__main__":
    print(umbel.run(federation)["metrics"])
