"""Environment of the tests: set before anything imports JAX."""

from importlib.metadata import version
import os


def _add_flags(*flags: str):
  """What the caller has set stays."""
  have = os.environ.get('XLA_FLAGS', '')
  new = [flag for flag in flags if flag.split('=')[0] not in have]
  os.environ['XLA_FLAGS'] = ' '.join([have, *new]).strip()


# Before JAX initialises its backend: eight simulated devices on any machine.
_add_flags('--xla_force_host_platform_device_count=8')
# Four fifths of the time went into compiling small programs that run once. `make test-all` compiles
# them as users do.
if os.environ.get('FQJAX_TEST_OPTIMIZED') != '1':
  _add_flags('--xla_backend_optimization_level=0')
  # Unknown flags end the process; releases after this one do not have it.
  if version('jax').startswith('0.10.'):
    _add_flags('--xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
