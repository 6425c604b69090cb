"""The task: the model, the data, and the federation that both apps come from.

60,000 photographs of clothes are divided among 100 nodes, most of which have only a few of the
ten kinds. Ten nodes a round train a small convolutional network on their own photographs; the
coordinator averages what they learned and tests the model on 10,000 photographs of its own.
"""

from torch import Tensor, nn

from umbel import Dirichlet, Federation, Partitioned, TorchTrainer


class Net(nn.Module):
    """Two convolutions and two dense layers: 55,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(nn.Linear(32 * 7 * 7, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


federation = Federation(
    trainer=TorchTrainer(Net, loss="cross-entropy"),
    data=Partitioned(
        "fashion-mnist",
        lambda options: Dirichlet(alpha=float(options["alpha"])),
        test_fraction=0.1,
    ),
)
