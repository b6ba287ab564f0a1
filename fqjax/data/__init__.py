"""Labelled images from disk to device: sources, preparation, host transforms, loader; text."""

from fqjax.data._device import InputSpec as InputSpec
from fqjax.data._device import estimate_statistics as estimate_statistics
from fqjax.data._device import preprocess as preprocess
from fqjax.data._device import spec_with_statistics as spec_with_statistics
from fqjax.data._images import CorruptImageError as CorruptImageError
from fqjax.data._images import decode_image as decode_image
from fqjax.data._images import encode_jpeg as encode_jpeg
from fqjax.data._loader import Corrupt as Corrupt
from fqjax.data._loader import Loader as Loader
from fqjax.data._loader import LoaderIterator as LoaderIterator
from fqjax.data._named import load_source as load_source
from fqjax.data._records import RecordSource as RecordSource
from fqjax.data._sources import ArraySource as ArraySource
from fqjax.data._sources import CachedSource as CachedSource
from fqjax.data._sources import FolderSource as FolderSource
from fqjax.data._sources import PartSource as PartSource
from fqjax.data._sources import Source as Source
from fqjax.data._sources import TfdsSource as TfdsSource
from fqjax.data._sources import ZipSource as ZipSource
from fqjax.data._text import Text as Text
from fqjax.data._text import load_text as load_text
from fqjax.data._text_batches import batched as batched
from fqjax.data._transforms import center_crop as center_crop
from fqjax.data._transforms import chain as chain
from fqjax.data._transforms import crop_box as crop_box
from fqjax.data._transforms import pad_crop as pad_crop
from fqjax.data._transforms import random_flip as random_flip
from fqjax.data._transforms import random_resized_crop as random_resized_crop
from fqjax.data._transforms import resize as resize
from fqjax.data._transforms import resize_crop as resize_crop

__all__ = [
  'ArraySource',
  'CachedSource',
  'Corrupt',
  'CorruptImageError',
  'FolderSource',
  'InputSpec',
  'Loader',
  'LoaderIterator',
  'PartSource',
  'RecordSource',
  'Source',
  'Text',
  'TfdsSource',
  'ZipSource',
  'batched',
  'center_crop',
  'chain',
  'crop_box',
  'decode_image',
  'encode_jpeg',
  'estimate_statistics',
  'load_source',
  'load_text',
  'pad_crop',
  'preprocess',
  'random_flip',
  'random_resized_crop',
  'resize',
  'resize_crop',
  'spec_with_statistics',
]
