"""Configurations: presets, arguments, and the errors for what is not there."""

import pytest

from configs import imagenet_freq
from configs.common import parse_arg


@pytest.mark.parametrize(
  'arg', ['', 'resnet50', 'mobilenet_v2', 'demo', 'tiny_imagenet10', 'cifar10', 'cifar10,smoke']
)
def test_presets_are_complete(arg):
  config = imagenet_freq.get_config(arg)
  assert set(config.keys()) == set(imagenet_freq.base().keys())


def test_arguments_are_read():
  config = imagenet_freq.get_config('cifar10,settings=rgb+dct,seeds=2,channels=12')
  assert config.settings == ('rgb', 'dct')
  assert config.seeds == (0, 1)
  assert config.dct.channels == 12


def test_equal_bytes_of_the_small_comparisons():
  for preset, sent in (('tiny_imagenet10', 3072), ('cifar10', 768)):
    config = imagenet_freq.get_config(preset)
    maps = (config.size // config.dct.block) ** 2
    assert 3 * config.rgb_size**2 == sent
    assert 2 * config.dct.channels * maps == sent


@pytest.mark.parametrize(
  'arg, message',
  [
    ('cifr10', 'cifar10'),
    ('seeds=two', 'int'),
    ('smoke=maybe', 'true or false'),
    ('lr=1', 'known'),
  ],
)
def test_unknown_arguments_are_errors(arg, message):
  with pytest.raises(ValueError, match=message):
    imagenet_freq.get_config(arg)


def test_unknown_and_mistyped_fields_are_errors():
  config = imagenet_freq.get_config()
  config.lock()
  with pytest.raises(AttributeError, match='learning_rate'):
    config.optim.learning_rate = 0.2
  with pytest.raises(TypeError):
    config.optim.lr = 'high'


def test_parse_arg_defaults():
  assert parse_arg('', ('a', 'b'), n=1) == {'preset': 'a', 'n': 1}
