"""Which values weights and activations may take: levels, mixtures, ranges."""

from fqjax.quantize._apply import fit as fit
from fqjax.quantize._apply import project as project
from fqjax.quantize._apply import straight_through as straight_through
from fqjax.quantize._apply import target as target
from fqjax.quantize._blend import indices as indices
from fqjax.quantize._blend import mixture_weights as mixture_weights
from fqjax.quantize._blend import responsibilities as responsibilities
from fqjax.quantize._components import MixtureLeaf as MixtureLeaf
from fqjax.quantize._components import RawMixtureLeaf as RawMixtureLeaf
from fqjax.quantize._components import codebook as codebook
from fqjax.quantize._components import int8_codebook as int8_codebook
from fqjax.quantize._components import sort_components as sort_components
from fqjax.quantize._effective import effective_params as effective_params
from fqjax.quantize._effective import freeze_assignments as freeze_assignments
from fqjax.quantize._effective import init_dgms as init_dgms
from fqjax.quantize._effective import labels as labels
from fqjax.quantize._encode import Coded as Coded
from fqjax.quantize._encode import encode as encode
from fqjax.quantize._encode import sizes as sizes
from fqjax.quantize._equalize import correct_bias as correct_bias
from fqjax.quantize._equalize import equalize as equalize
from fqjax.quantize._fake_quant import FakeQuantParams as FakeQuantParams
from fqjax.quantize._fake_quant import fake_quant as fake_quant
from fqjax.quantize._fake_quant import fake_quantize as fake_quantize
from fqjax.quantize._fake_quant import init_fake_quant as init_fake_quant
from fqjax.quantize._fake_quant import with_weights as with_weights
from fqjax.quantize._integer import IntegerLayer as IntegerLayer
from fqjax.quantize._integer import float_layers as float_layers
from fqjax.quantize._integer import integer_graph as integer_graph
from fqjax.quantize._integer import integer_layer as integer_layer
from fqjax.quantize._interval import Scale as Scale
from fqjax.quantize._interval import exact_scale as exact_scale
from fqjax.quantize._interval import search_scale as search_scale
from fqjax.quantize._kmeans import Clusters as Clusters
from fqjax.quantize._kmeans import kmeans as kmeans
from fqjax.quantize._levels import Binary as Binary
from fqjax.quantize._levels import Interval as Interval
from fqjax.quantize._levels import PowerOfTwo as PowerOfTwo
from fqjax.quantize._levels import Ternary as Ternary
from fqjax.quantize._levels import Uniform as Uniform
from fqjax.quantize._mixture import Mixture as Mixture
from fqjax.quantize._observe import Observed as Observed
from fqjax.quantize._observe import calibrate as calibrate
from fqjax.quantize._observe import intermediates as intermediates
from fqjax.quantize._observe import observe as observe
from fqjax.quantize._observe import observe_nothing as observe_nothing
from fqjax.quantize._observe import observed as observed
from fqjax.quantize._observe import seen as seen
from fqjax.quantize._plan import Entry as Entry
from fqjax.quantize._plan import Plan as Plan
from fqjax.quantize._plan import describe as describe
from fqjax.quantize._plan import make_plan as make_plan
from fqjax.quantize._quantizer import Quantizer as Quantizer
from fqjax.quantize._ranges import METHODS as METHODS
from fqjax.quantize._ranges import Range as Range
from fqjax.quantize._ranges import Seen as Seen
from fqjax.quantize._sensitivity import allocate_bits as allocate_bits
from fqjax.quantize._sensitivity import loss_increases as loss_increases
from fqjax.quantize._sensitivity import projection_errors as projection_errors
from fqjax.quantize._steps import Step as Step
from fqjax.quantize._steps import activations as activations
from fqjax.quantize._steps import find_steps as find_steps

__all__ = [
  'METHODS',
  'Binary',
  'Clusters',
  'Coded',
  'Entry',
  'FakeQuantParams',
  'IntegerLayer',
  'Interval',
  'Mixture',
  'MixtureLeaf',
  'Observed',
  'Plan',
  'PowerOfTwo',
  'Quantizer',
  'Range',
  'RawMixtureLeaf',
  'Scale',
  'Seen',
  'Step',
  'Ternary',
  'Uniform',
  'activations',
  'allocate_bits',
  'calibrate',
  'codebook',
  'correct_bias',
  'describe',
  'effective_params',
  'encode',
  'equalize',
  'exact_scale',
  'fake_quant',
  'fake_quantize',
  'find_steps',
  'fit',
  'float_layers',
  'freeze_assignments',
  'indices',
  'init_dgms',
  'init_fake_quant',
  'int8_codebook',
  'integer_graph',
  'integer_layer',
  'intermediates',
  'kmeans',
  'labels',
  'loss_increases',
  'make_plan',
  'mixture_weights',
  'observe',
  'observe_nothing',
  'observed',
  'project',
  'projection_errors',
  'responsibilities',
  'search_scale',
  'seen',
  'sizes',
  'sort_components',
  'straight_through',
  'target',
  'with_weights',
]
