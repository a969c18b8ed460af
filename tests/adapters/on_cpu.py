"""A plugin of axolotl that lets it train on more than one CPU process: it puts weights on GPU number LOCAL_RANK."""

from axolotl.integrations.base import BasePlugin


class OnCPU(BasePlugin):
    def load_datasets(self, cfg, preprocess=False):
        """Called between the configuration, where axolotl says where weights go, and the model."""
        cfg.device_map = {"": "cpu"}
