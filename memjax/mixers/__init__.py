"""The registry of sequence mixers: `MIXERS[kind] = (Config, Mixer)`.

To add one: a file here, an oracle in `tests/oracles/`, a config in `configs/`, and a line below.
"""

from memjax.mixers.all_attention import AllAttention, AllAttentionMixer
from memjax.mixers.attention import Attention, AttentionMixer
from memjax.mixers.base import MemoryReport, MixerConfig, SequenceMixer
from memjax.mixers.base_conv import BaseConv, BaseConvMixer
from memjax.mixers.based import Based, BasedMixer
from memjax.mixers.compressive import Compressive, CompressiveMixer
from memjax.mixers.deltanet import DeltaNet, DeltaNetMixer
from memjax.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetMixer
from memjax.mixers.gla import GLA, GLAMixer
from memjax.mixers.hgrn2 import HGRN2, HGRN2Mixer
from memjax.mixers.infini import Infini, InfiniMixer
from memjax.mixers.landmark import Landmark, LandmarkMixer
from memjax.mixers.linear_attention import LinearAttention, LinearAttentionMixer
from memjax.mixers.linear_transformer import LinearTransformer, LinearTransformerMixer
from memjax.mixers.lstm import LSTM, LSTMMixer
from memjax.mixers.mamba import Mamba, MambaMixer
from memjax.mixers.mamba2 import Mamba2, Mamba2Mixer
from memjax.mixers.memorizing import Memorizing, MemorizingMixer
from memjax.mixers.miras import MirasMixer
from memjax.mixers.miras_config import Memora, Miras, Moneta, Yaad
from memjax.mixers.mlstm import MLSTM, MLSTMMixer
from memjax.mixers.mom import MoM, MoMMixer
from memjax.mixers.retnet import RetNet, RetNetMixer
from memjax.mixers.rg_lru import RGLRU, RGLRUMixer
from memjax.mixers.titans_lmm import TitansLMM, TitansLMMMixer
from memjax.mixers.titans_mac import TitansMAC, TitansMACMixer
from memjax.mixers.titans_mag import TitansMAG, TitansMAGMixer
from memjax.mixers.titans_mal import TitansMAL, TitansMALMixer
from memjax.mixers.transformer_xl import TransformerXL, TransformerXLMixer
from memjax.mixers.ttt import TTTMLP, TTTLinear, TTTLinearMixer, TTTMLPMixer

MIXERS: dict[str, tuple[type[MixerConfig], type[SequenceMixer]]] = {
    "attention": (Attention, AttentionMixer),
    "all_attention": (AllAttention, AllAttentionMixer),
    "linear_attention": (LinearAttention, LinearAttentionMixer),
    "gated_deltanet": (GatedDeltaNet, GatedDeltaNetMixer),
    "lstm": (LSTM, LSTMMixer),
    "base_conv": (BaseConv, BaseConvMixer),
    "based": (Based, BasedMixer),
    "deltanet": (DeltaNet, DeltaNetMixer),
    "gla": (GLA, GLAMixer),
    "linear_transformer": (LinearTransformer, LinearTransformerMixer),
    "mom": (MoM, MoMMixer),
    "retnet": (RetNet, RetNetMixer),
    "mamba": (Mamba, MambaMixer),
    "rg_lru": (RGLRU, RGLRUMixer),
    "mamba2": (Mamba2, Mamba2Mixer),
    "ttt_linear": (TTTLinear, TTTLinearMixer),
    "ttt_mlp": (TTTMLP, TTTMLPMixer),
    "mlstm": (MLSTM, MLSTMMixer),
    "hgrn2": (HGRN2, HGRN2Mixer),
    "titans_lmm": (TitansLMM, TitansLMMMixer),
    "titans_mac": (TitansMAC, TitansMACMixer),
    "titans_mag": (TitansMAG, TitansMAGMixer),
    "titans_mal": (TitansMAL, TitansMALMixer),
    "miras": (Miras, MirasMixer),
    "moneta": (Moneta, MirasMixer),
    "yaad": (Yaad, MirasMixer),
    "memora": (Memora, MirasMixer),
    "compressive": (Compressive, CompressiveMixer),
    "landmark": (Landmark, LandmarkMixer),
    "infini": (Infini, InfiniMixer),
    "memorizing": (Memorizing, MemorizingMixer),
    "transformer_xl": (TransformerXL, TransformerXLMixer),
}

__all__ = [
    "GLA",
    "HGRN2",
    "LSTM",
    "MIXERS",
    "MLSTM",
    "RGLRU",
    "TTTMLP",
    "AllAttention",
    "Attention",
    "BaseConv",
    "Based",
    "Compressive",
    "DeltaNet",
    "GatedDeltaNet",
    "Infini",
    "Landmark",
    "LinearAttention",
    "LinearTransformer",
    "Mamba",
    "Mamba2",
    "Memora",
    "Memorizing",
    "MemoryReport",
    "Miras",
    "MixerConfig",
    "MoM",
    "Moneta",
    "RetNet",
    "SequenceMixer",
    "TTTLinear",
    "TitansLMM",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "TransformerXL",
    "Yaad",
]
