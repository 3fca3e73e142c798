"""Lets transformers load this compressed checkpoint with `trust_remote_code=True` and without an `import globe`.

config.json names the class below in its `auto_map`. The model's configuration and classes are transformers' own.
"""

from transformers import AutoConfig

try:
    import globe.model.register  # noqa: F401 - teaches transformers the format
except ImportError as error:
    raise ImportError(
        f"the experts of this checkpoint are compressed by GloBE, which cannot be imported ({error}): "
        "install GloBE and load the checkpoint again"
    ) from error


class GlobeAutoConfig:
    """Stands where transformers looks for remote code, and answers with the native configuration."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """The configuration as it is loaded without remote code."""
        return AutoConfig.from_pretrained(pretrained_model_name_or_path, trust_remote_code=False, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing to register: a native class that were marked as remote code would be saved as such."""
