"""Run a script with small ResNets, which take a fraction of the time to compute and to save.

    python tests/small_networks.py SCRIPT OPTION ...

They have the parts of a ResNet, but one block a stage and an eighth of the channels.
"""

import runpy
import sys

import torch
import torchvision
from torchvision.models.resnet import BasicBlock, ResNet


class SmallResNet(ResNet):
    def __init__(self):
        super().__init__(BasicBlock, layers=[1, 1, 1, 1])
        self.fc = torch.nn.Linear(512 // 8, 1)  # its inputs tell model.Encoder the channels

    def _make_layer(self, block, planes, *rest, **options):
        return super()._make_layer(block, planes // 8, *rest, **options)


def small_resnet(name, weights):
    """In the place of torchvision.models.get_model."""
    return SmallResNet()


if __name__ == "__main__":
    torchvision.models.get_model = small_resnet
    del sys.argv[0]
    sys.path.insert(0, sys.argv[0].rpartition("/")[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
