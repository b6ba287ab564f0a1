"""Pictures and photographs of the report, inside the page as inline data."""

import base64
from collections.abc import Sequence
import html
import io
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

MAX_SAMPLES = 48
# Pixels of a picture per pixel of the page: sharp on dense screens too.
DENSITY = 1.5
# Text of 10 points stays readable down to this scale; a narrower window scrolls.
LEAST_SCALE = 0.75


class Sample(NamedTuple):
  """A photograph and what the network said.

  Attributes:
    image: uint8 [h, w, 3].
    label: true class, as an index or a name.
    prediction: predicted class, likewise.
    probability: of the predicted class, 0..1, if known.
  """

  image: np.ndarray
  label: int | str
  prediction: int | str
  probability: float | None = None


class Picture(NamedTuple):
  """A Matplotlib figure of the report.

  Attributes:
    title: heading above it.
    figure: a `matplotlib.figure.Figure`, e.g. of `fqjax.sparsity.plots`.
    caption: a sentence or two below it.
  """

  title: str
  figure: Any
  caption: str = ''


def class_name(label: Any, class_names: Sequence[str] | None) -> str:
  """The name of a class, given by its index or its name."""
  if isinstance(label, str):
    return label
  if class_names is not None and 0 <= int(label) < len(class_names):
    return str(class_names[int(label)])
  return f'class {int(label)}'


def _data_url(image: np.ndarray, side: int = 224) -> str:
  """A PNG of a small image, a JPEG of a large one, both inside the page."""
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
    raise ValueError(f'a sample image is uint8 [h, w, 3], got {image.dtype} {list(image.shape)}.')
  picture = PIL.Image.fromarray(image)
  large = max(picture.size) > side
  if large:
    picture.thumbnail((side, side))
  buffer = io.BytesIO()
  kind = 'jpeg' if large else 'png'
  picture.save(buffer, kind, **({'quality': 88} if large else {}))
  return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def samples_html(samples: Sequence[Sample], class_names: Sequence[str] | None) -> str:
  """Photographs with what was said of them; '' where there are none."""
  figures = []
  for sample in [Sample(*sample) for sample in samples][:MAX_SAMPLES]:
    label, said = (class_name(x, class_names) for x in (sample.label, sample.prediction))
    right = label == said
    sure = '' if sample.probability is None else f' {100 * sample.probability:.0f}&nbsp;%'
    if right:
      caption = f'<b><span aria-hidden="true">✓</span> right</b><br>{html.escape(said)}{sure}'
    else:
      caption = (
        f'<b><span aria-hidden="true">✗</span> wrong</b><br>{html.escape(said)}{sure}<br>'
        f'<span class="was">was {html.escape(label)}</span>'
      )
    figures.append(
      f'<figure class="{"right" if right else "wrong"}">'
      f'<img src="{_data_url(sample.image)}" alt="Photograph of class {html.escape(label)}" '
      f'width="{sample.image.shape[1]}" height="{sample.image.shape[0]}">'
      f'<figcaption>{caption}</figcaption></figure>'
    )
  return f'<div class="samples">{"".join(figures)}</div>' if figures else ''


def pictures_html(pictures: Sequence[Picture]) -> str:
  """Figures in boxes that scroll sideways where a window is too narrow to read them."""
  parts = []
  for title, figure, caption in (Picture(*picture) for picture in pictures):
    if not hasattr(figure, 'savefig'):
      raise ValueError(
        f'picture {title!r} holds {type(figure).__name__}, not a Matplotlib figure; of axes: '
        'axes.figure.'
      )
    width, height = (96 * inches for inches in figure.get_size_inches())
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=96 * DENSITY, facecolor='white')
    url = f'data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'
    name = html.escape(title)
    note = f'<p class="note">{html.escape(caption)}</p>' if caption else ''
    parts.append(
      f'<figure class="picture"><figcaption>{name}</figcaption>'
      f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">'
      f'<img src="{url}" alt="{html.escape(_in_words(title, figure))}" width="{width:.0f}" '
      f'height="{height:.0f}" style="--least:{LEAST_SCALE * width:.0f}px"></div>{note}</figure>'
    )
  return f'<div class="pictures">{"".join(parts)}</div>' if parts else ''


def _in_words(title: str, figure: Any) -> str:
  """What a picture shows to readers who do not see it: panels, and the names of their axes."""
  said = [title]
  for axes in figure.axes:
    parts = (
      ('', axes.get_title()),
      ('vertical: ', axes.get_ylabel()),
      ('horizontal: ', axes.get_xlabel()),
    )
    said.append(', '.join(what + ' '.join(text.split()) for what, text in parts if text))
  return '. '.join(dict.fromkeys(filter(None, said)))
