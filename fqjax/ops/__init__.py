"""Array in, array out: cosine and wavelet transforms, JPEG colour and coefficients, channels."""

from fqjax.ops._block_dct import block_dct as block_dct
from fqjax.ops._block_dct import block_flip_left_right as block_flip_left_right
from fqjax.ops._block_dct import block_flip_up_down as block_flip_up_down
from fqjax.ops._block_dct import block_idct as block_idct
from fqjax.ops._block_dct import block_merge as block_merge
from fqjax.ops._block_dct import block_resize as block_resize
from fqjax.ops._block_dct import block_rot90 as block_rot90
from fqjax.ops._block_dct import block_split as block_split
from fqjax.ops._block_dct import block_transpose as block_transpose
from fqjax.ops._block_dct import from_zigzag as from_zigzag
from fqjax.ops._block_dct import pad_to as pad_to
from fqjax.ops._block_dct import to_zigzag as to_zigzag
from fqjax.ops._block_dct import zigzag as zigzag
from fqjax.ops._block_dct import zigzag_rank as zigzag_rank
from fqjax.ops._channels import ChannelStatistics as ChannelStatistics
from fqjax.ops._channels import CoefficientStatistics as CoefficientStatistics
from fqjax.ops._channels import channel_subset as channel_subset
from fqjax.ops._channels import finalize_statistics as finalize_statistics
from fqjax.ops._channels import init_statistics as init_statistics
from fqjax.ops._channels import list_channel_subsets as list_channel_subsets
from fqjax.ops._channels import merge_statistics as merge_statistics
from fqjax.ops._channels import released_statistics as released_statistics
from fqjax.ops._channels import select_channels as select_channels
from fqjax.ops._channels import update_statistics as update_statistics
from fqjax.ops._channels import within_image_std as within_image_std
from fqjax.ops._dct import dct as dct
from fqjax.ops._dct import dctn as dctn
from fqjax.ops._dct import idct as idct
from fqjax.ops._dct import idctn as idctn
from fqjax.ops._jpeg import chroma_filter as chroma_filter
from fqjax.ops._jpeg import coefficients_to_rgb as coefficients_to_rgb
from fqjax.ops._jpeg import quantization_tables as quantization_tables
from fqjax.ops._jpeg import rgb_to_coefficients as rgb_to_coefficients
from fqjax.ops._jpeg import rgb_to_ycbcr as rgb_to_ycbcr
from fqjax.ops._jpeg import subsample_chroma as subsample_chroma
from fqjax.ops._jpeg import upsample_chroma as upsample_chroma
from fqjax.ops._jpeg import ycbcr_to_rgb as ycbcr_to_rgb
from fqjax.ops._wavelet_banks import Wavelet as Wavelet
from fqjax.ops._wavelet_banks import analysis_matrix as analysis_matrix
from fqjax.ops._wavelet_banks import dwt_coeff_len as dwt_coeff_len
from fqjax.ops._wavelet_banks import dwt_max_level as dwt_max_level
from fqjax.ops._wavelet_banks import dwtn_max_level as dwtn_max_level
from fqjax.ops._wavelet_banks import synthesis_matrix as synthesis_matrix
from fqjax.ops._wavelet_banks import wavelist as wavelist
from fqjax.ops._wavelet_packets import wavelet_packet_dec2 as wavelet_packet_dec2
from fqjax.ops._wavelet_packets import wavelet_packet_grid as wavelet_packet_grid
from fqjax.ops._wavelet_packets import wavelet_packet_rec2 as wavelet_packet_rec2
from fqjax.ops._wavelets import array_to_coeffs as array_to_coeffs
from fqjax.ops._wavelets import coeffs_to_array as coeffs_to_array
from fqjax.ops._wavelets import dwt as dwt
from fqjax.ops._wavelets import dwt2 as dwt2
from fqjax.ops._wavelets import dwtn as dwtn
from fqjax.ops._wavelets import idwt as idwt
from fqjax.ops._wavelets import idwt2 as idwt2
from fqjax.ops._wavelets import idwtn as idwtn
from fqjax.ops._wavelets import wavedec as wavedec
from fqjax.ops._wavelets import wavedec2 as wavedec2
from fqjax.ops._wavelets import wavedecn as wavedecn
from fqjax.ops._wavelets import waverec as waverec
from fqjax.ops._wavelets import waverec2 as waverec2
from fqjax.ops._wavelets import waverecn as waverecn

__all__ = [
  'ChannelStatistics',
  'CoefficientStatistics',
  'Wavelet',
  'analysis_matrix',
  'array_to_coeffs',
  'block_dct',
  'block_flip_left_right',
  'block_flip_up_down',
  'block_idct',
  'block_merge',
  'block_resize',
  'block_rot90',
  'block_split',
  'block_transpose',
  'channel_subset',
  'chroma_filter',
  'coefficients_to_rgb',
  'coeffs_to_array',
  'dct',
  'dctn',
  'dwt',
  'dwt2',
  'dwt_coeff_len',
  'dwt_max_level',
  'dwtn',
  'dwtn_max_level',
  'finalize_statistics',
  'from_zigzag',
  'idct',
  'idctn',
  'idwt',
  'idwt2',
  'idwtn',
  'init_statistics',
  'list_channel_subsets',
  'merge_statistics',
  'pad_to',
  'quantization_tables',
  'released_statistics',
  'rgb_to_coefficients',
  'rgb_to_ycbcr',
  'select_channels',
  'subsample_chroma',
  'synthesis_matrix',
  'to_zigzag',
  'update_statistics',
  'upsample_chroma',
  'wavedec',
  'wavedec2',
  'wavedecn',
  'wavelet_packet_dec2',
  'wavelet_packet_grid',
  'wavelet_packet_rec2',
  'wavelist',
  'waverec',
  'waverec2',
  'waverecn',
  'within_image_std',
  'ycbcr_to_rgb',
  'zigzag',
  'zigzag_rank',
]
