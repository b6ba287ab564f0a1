"""Training: state, step, loop, mesh, checkpoints, metrics, several processes."""

from fqjax.train.checkpoint import CheckpointError as CheckpointError
from fqjax.train.checkpoint import Checkpoints as Checkpoints
from fqjax.train.checkpoint import Restored as Restored
from fqjax.train.checkpoint import check_workdir as check_workdir
from fqjax.train.checkpoint import state_bytes as state_bytes
from fqjax.train.distributed import enable_compile_cache as enable_compile_cache
from fqjax.train.distributed import initialize_distributed as initialize_distributed
from fqjax.train.distributed import is_main as is_main
from fqjax.train.distributed import synchronize as synchronize
from fqjax.train.loop import FitResult as FitResult
from fqjax.train.loop import NonFiniteError as NonFiniteError
from fqjax.train.loop import fit as fit
from fqjax.train.mesh import batch_sharding as batch_sharding
from fqjax.train.mesh import make_mesh as make_mesh
from fqjax.train.mesh import replicate as replicate
from fqjax.train.mesh import replicated_sharding as replicated_sharding
from fqjax.train.mesh import shard_batch as shard_batch
from fqjax.train.metrics import JsonLines as JsonLines
from fqjax.train.metrics import TensorBoard as TensorBoard
from fqjax.train.metrics import Writer as Writer
from fqjax.train.metrics import compile_count as compile_count
from fqjax.train.metrics import memory_bytes as memory_bytes
from fqjax.train.metrics import read_json_lines as read_json_lines
from fqjax.train.report import Picture as Picture
from fqjax.train.report import Sample as Sample
from fqjax.train.report import Table as Table
from fqjax.train.report import write_report as write_report
from fqjax.train.state import Averages as Averages
from fqjax.train.state import TrainState as TrainState
from fqjax.train.state import create_state as create_state
from fqjax.train.state import decay_mask as decay_mask
from fqjax.train.step import TrainStep as TrainStep
from fqjax.train.step import evaluate as evaluate
from fqjax.train.step import make_eval_step as make_eval_step
from fqjax.train.step import make_train_step as make_train_step

__all__ = [
  'Averages',
  'CheckpointError',
  'Checkpoints',
  'FitResult',
  'JsonLines',
  'NonFiniteError',
  'Picture',
  'Restored',
  'Sample',
  'Table',
  'TensorBoard',
  'TrainState',
  'TrainStep',
  'Writer',
  'batch_sharding',
  'check_workdir',
  'compile_count',
  'create_state',
  'decay_mask',
  'enable_compile_cache',
  'evaluate',
  'fit',
  'initialize_distributed',
  'is_main',
  'make_eval_step',
  'make_mesh',
  'make_train_step',
  'memory_bytes',
  'read_json_lines',
  'replicate',
  'replicated_sharding',
  'shard_batch',
  'state_bytes',
  'synchronize',
  'write_report',
]
