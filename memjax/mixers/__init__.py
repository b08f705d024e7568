"""The registry of sequence mixers: `MIXERS[kind] = (Config, Mixer)`.

To add one: a file here, an oracle in `tests/oracles/`, a config in `configs/`, and a line below.
"""

from memjax.mixers.attention import Attention, AttentionMixer
from memjax.mixers.base import MemoryReport, MixerConfig, SequenceMixer
from memjax.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetMixer
from memjax.mixers.linear_attention import LinearAttention, LinearAttentionMixer
from memjax.mixers.lstm import LSTM, LSTMMixer

MIXERS: dict[str, tuple[type[MixerConfig], type[SequenceMixer]]] = {
    "attention": (Attention, AttentionMixer),
    "linear_attention": (LinearAttention, LinearAttentionMixer),
    "gated_deltanet": (GatedDeltaNet, GatedDeltaNetMixer),
    "lstm": (LSTM, LSTMMixer),
}

__all__ = [
    "MIXERS",
    "Attention",
    "GatedDeltaNet",
    "LSTM",
    "LinearAttention",
    "MemoryReport",
    "MixerConfig",
    "SequenceMixer",
]
