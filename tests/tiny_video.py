"""A model of clips that timm might have: it shows its features, and its input has a time axis."""

from torch import nn


class TinyVideo(nn.Module):
    """Two frames to a token; `feature_info` and `forward_intermediates` are as timm has them."""

    def __init__(self, num_classes=0, **kwargs):
        super().__init__()
        self.pretrained_cfg = {
            "input_size": (3, 4, 32, 32),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        }
        self.feature_info = [{"num_chs": 8, "reduction": 8}, {"num_chs": 12, "reduction": 16}]
        self.num_features = 12
        self.stem = nn.Conv3d(3, 8, (2, 8, 8), stride=(2, 8, 8))
        self.stage = nn.Conv3d(8, 12, (1, 2, 2), stride=(1, 2, 2))

    def forward_intermediates(self, x, indices=None):
        first = self.stem(x)
        last = self.stage(first)
        return last, [(first, last)[index] for index in indices]

    def forward_head(self, x, pre_logits=False):
        return x.mean(dim=(2, 3, 4))
