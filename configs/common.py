"""What configs share: the argument after the colon, `--config=file.py:name,key=value`."""

import difflib


def parse_arg(arg: str, presets: tuple[str, ...], **defaults):
  """Reads `'preset,flag,key=value'` into a dict with the keys of `defaults` plus `'preset'`.

  Args:
    arg: the text after the colon; empty means the first preset.
    presets: names of which at most one may appear.
    **defaults: accepted keys; a value is converted to its default's type, and a key without a
      value means `True`.

  Raises:
    ValueError: an unknown word, or a value of the wrong type.

  Example:
    >>> parse_arg('small,seeds=3', ('big', 'small'), seeds=1, smoke=False)
    {'preset': 'small', 'seeds': 3, 'smoke': False}
  """
  result = {'preset': presets[0], **defaults}
  for word in filter(None, arg.split(',')):
    key, has_value, value = word.partition('=')
    if not has_value and key in presets:
      result['preset'] = key
      continue
    if key not in defaults:
      known = [*presets, *defaults]
      near = difflib.get_close_matches(key, known, n=1)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      raise ValueError(f'config argument {word!r} is unknown; known are {", ".join(known)}.{hint}')
    kind = type(defaults[key])
    if kind is bool:
      if value not in ('', 'true', 'false', 'True', 'False'):
        raise ValueError(f'config argument {key} takes true or false, got {value!r}')
      result[key] = value.lower() != 'false'
    else:
      try:
        result[key] = kind(value)
      except ValueError:
        raise ValueError(
          f'config argument {key} takes a value of type {kind.__name__}, got {value!r}'
        ) from None
  return result


def narrow(config, arg) -> None:
  """Sets what of a comparison is run, from `settings=a+b` and `seeds=N`; empty ones change nothing."""
  if arg['settings']:
    config.settings = tuple(arg['settings'].split('+'))
  if arg['seeds']:
    config.seeds = tuple(range(arg['seeds']))


def imagenet(config) -> None:
  """Sets `data` to ImageNet of TFDS, a hundredth of the training images held out."""
  d = config.data
  d.name = 'tfds:imagenet2012'
  d.train_split, d.held_out_split, d.test_split = 'train[:99%]', 'train[99%:]', 'validation'
  d.batch_size, d.workers, d.augment, d.size = 256, 16, 'random_resized_crop', 224
