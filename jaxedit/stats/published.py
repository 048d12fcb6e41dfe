"""Second moments that ROME and MEMIT publish.

One .npz archive a layer, `<module>_float32_mom2_<n>.npz`, n the number of
documents. Its entry `mom2.mom2` is the *sum* of k k^T over tokens and
`mom2.count` the number of tokens (upstream divides when it uses them):

  C = mom2.mom2 / mom2.count

Archives are read without pickle, so they can run no code. Nothing is downloaded
here.

Source: Meng et al. 2022 (ROME, arXiv 2202.05262) and 2022b (MEMIT, arXiv
2210.07229), the archives as their code writes them.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from jaxedit.stats import npz, storage
from jaxedit.stats.storage import Moments
from jaxedit.types import InputError

_ARCHIVE = re.compile(r'(?P<module>.+)_float\d+_mom2(?:_.*)?\.npz')
# The linear map that a published module name means, by its last part.
_SITES = {
    ('mlp', 'c_proj'): 'mlp/down',
    ('mlp', 'fc_out'): 'mlp/down',
    ('mlp', 'dense_4h_to_h'): 'mlp/down',
    ('mlp', 'down_proj'): 'mlp/down',
    ('attn', 'c_proj'): 'attn/out',
    ('attn', 'out_proj'): 'attn/out',
    ('attention', 'dense'): 'attn/out',
    ('self_attn', 'o_proj'): 'attn/out',
}


def _archives(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], site: str
) -> dict[int, list[pathlib.Path]]:
  """Finds published archives of a site: layer -> files."""
  if isinstance(source, (str, os.PathLike)):
    root = pathlib.Path(source)
    paths = sorted(root.glob('*.npz')) if root.is_dir() else [root]
  else:
    paths = [pathlib.Path(path) for path in source]
  found: dict[int, list[pathlib.Path]] = {}
  for path in paths:
    match = _ARCHIVE.fullmatch(path.name)
    parts = match['module'].split('.') if match else []
    numbers = [int(part) for part in parts if part.isdigit()]
    if len(numbers) == 1 and _SITES.get(tuple(parts[-2:])) == site:
      found.setdefault(numbers[0], []).append(path)
  return found


def _read_archive(
    path: pathlib.Path, width: int | None
) -> tuple[np.ndarray, int]:
  """Reads one archive: the average [F, F] in float64 and the token count."""
  try:
    found = npz.read(path, {'mom2.count': (), 'mom2.mom2': (width, width)})
  except npz.ERRORS as error:
    reason = getattr(error, 'strerror', None) or error or type(error).__name__
    raise InputError(
        f'{path}: has no readable mom2.count and mom2.mom2 ({reason}); take'
        ' the archive of this very model, or download it again'
    ) from error
  total = found['mom2.mom2'].astype(np.float64)
  count = float(found['mom2.count'])
  if total.shape[0] != total.shape[1] or not total.size:
    raise InputError(
        f'{path}: mom2.mom2 has shape {list(total.shape)}, which is not square;'
        ' take the archive of this very model'
    )
  if not (1 <= count < 2**63 and count == int(count)):
    raise InputError(
        f'{path}: says that it counts {count:g} tokens; download it again'
    )
  # An f32 running sum is symmetric up to rounding only.
  gram = (total + total.T) / (2 * count)
  storage.check_gram(gram, f'{path}', 'download it again')
  return gram, int(count)


def load_npz(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    layers: Sequence[int],
    width: int | None = None,
    model_hash: str = '',
    site: str = 'mlp/down',
) -> Moments:
  """Reads the archives that ROME and MEMIT publish.

  Args:
    source: folder with the archives, one archive, or several.
    layers: layers wanted.
    width: key width F that the model needs; None takes any.
    model_hash: the archives name no model; this is the one the caller vouches
      for, kept in the provenance.
    site: linear map; other archives of the folder are left alone.

  Returns:
    The moments, in float64. `count` is the smallest of the layers.

  Raises:
    InputError: a layer without an archive or with several, a damaged archive,
      a wrong shape; all faults at once.
  """
  found = _archives(source, site)
  problems, grams, counts = [], [], []
  for layer in layers:
    paths = found.get(layer, [])
    if len(paths) != 1:
      problems.append(
          f'{source}: {len(paths)} archives of {site} in layer {layer}'
          ' (<module>_float32_mom2_<n>.npz); give exactly one a layer, or'
          ' collect the moments'
      )
      continue
    with InputError.collected(problems):
      gram, count = _read_archive(paths[0], width)
      grams.append(gram)
      counts.append(count)
  InputError.raise_for(problems)
  provenance = {
      'model': model_hash,
      'corpus': 'published archives',
      'files': [found[layer][0].name for layer in layers],
      'counts': counts,
      'layers': list(layers),
      'site': site,
      'dtype': 'float32',
  }
  return Moments(tuple(layers), np.stack(grams), min(counts), provenance)
