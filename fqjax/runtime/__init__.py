"""What remains of a network outside JAX: NumPy is all this room imports.

>>> import fqjax.runtime
>>> model = fqjax.runtime.load('model.fqx')  # doctest: +SKIP
>>> y = model(x)  # doctest: +SKIP
"""

from fqjax.runtime._file import ArtifactError as ArtifactError
from fqjax.runtime._model import Model as Model
from fqjax.runtime._model import Spec as Spec
from fqjax.runtime._model import load as load
from fqjax.runtime._model import loads as loads

__all__ = ['ArtifactError', 'Model', 'Spec', 'load', 'loads']
