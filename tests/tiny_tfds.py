"""Small TFDS sets written on the spot, in the formats real ones have; no TensorFlow involved."""

import io
import pathlib

import numpy as np
from PIL import Image


def photograph(index: int, label: int, size: tuple[int, int] = (80, 96)) -> np.ndarray:
  """A picture whose left half is brighter the larger its label; uint8 [height, width, 3]."""
  rng = np.random.default_rng([index, label])
  image = rng.integers(0, 60, (*size, 3)).astype(np.float64)
  image[:, : size[1] // 2] += 20 * (label % 10)
  return np.clip(image, 0, 255).astype(np.uint8)


def jpeg(image: np.ndarray, **options) -> bytes:
  """Encodes uint8 [height, width, 3]."""
  out = io.BytesIO()
  Image.fromarray(image).save(out, 'JPEG', quality=90, **options)
  return out.getvalue()


def write_tiny_imagenet(
  data_dir: str | pathlib.Path,
  n_train: int = 12,
  n_val: int = 6,
  *,
  labels: int = 10,
  file_format: str = 'array_record',
  shards: int = 2,
) -> pathlib.Path:
  """Writes `data_dir/imagenet2012/5.1.0` in the format of the real builder.

  Args:
    data_dir: TFDS data folder.
    n_train: images of the split 'train'.
    n_val: images of the split 'validation'.
    labels: only the first so many of the 1,000 classes occur, in turn.
    file_format: 'array_record' or 'tfrecord'.
    shards: files per split.

  Returns:
    The folder of the set; `tfds.builder('imagenet2012', data_dir=data_dir)` reads it.
  """
  import tensorflow_datasets as tfds

  builder = tfds.builder('imagenet2012', data_dir=str(data_dir))
  return write_tfds(
    builder.info.features,
    pathlib.Path(data_dir) / 'imagenet2012' / '5.1.0',
    'imagenet2012',
    '5.1.0',
    {
      split: [
        {
          'image': io.BytesIO(jpeg(photograph(i + offset, i % labels))),
          'label': i % labels,
          'file_name': f'{split}_{i:04d}.JPEG',
        }
        for i in range(n)
      ]
      for split, n, offset in (('train', n_train, 0), ('validation', n_val, 10_000))
    },
    file_format,
    shards,
  )


def write_tfds(
  features, folder, name, version, splits, file_format='array_record', shards=2
) -> pathlib.Path:
  """Writes examples of any features as TFDS lays them out on disk."""
  from array_record.python import array_record_module
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import example_serializer, naming
  from tensorflow_datasets.core import splits as splits_lib

  from fqjax.data import _tfrecord

  folder.mkdir(parents=True)
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
  infos = []
  for split, examples in splits.items():
    data = [serializer.serialize_example(features.encode_example(e)) for e in examples]
    template = naming.ShardedFileTemplate(
      dataset_name=name, data_dir=folder, split=split, filetype_suffix=file_format
    )
    parts = [list(p) for p in np.array_split(np.arange(len(data)), shards)]
    for i, part in enumerate(parts):
      path = str(template.sharded_filepath(shard_index=i, num_shards=shards))
      if file_format == 'array_record':
        writer = array_record_module.ArrayRecordWriter(path, 'group_size:1')
        for j in part:
          writer.write(data[j])
        writer.close()
      else:
        with open(path, 'wb') as f:
          for j in part:
            _tfrecord.write_tfrecord(f, data[j])
    infos.append(
      splits_lib.SplitInfo(
        name=split,
        shard_lengths=[len(p) for p in parts],
        num_bytes=sum(map(len, data)),
        filename_template=template,
      )
    )

  info = tfds.core.DatasetInfo(
    builder=tfds.core.DatasetIdentity(
      name=name,
      version=tfds.core.Version(version),
      data_dir=str(folder),
      module_name='tiny_tfds',
    ),
    features=features,
    supervised_keys=('image', 'label'),
  )
  info.set_file_format(file_format)
  info.set_splits(splits_lib.SplitDict(infos))
  info.write_to_directory(folder)
  return folder
