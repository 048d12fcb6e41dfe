"""Holds the names that the code no longer uses: one word, one meaning."""

from __future__ import annotations

import io
import pathlib
import tokenize

from absl.testing import absltest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Classes, functions, modules, fields and variables; see docs/glossary.md for the
# words that took their place.
RETIRED = frozenset("""
    Schedule Metric Room Frame frame_for Tile row_tiles key_tiles Seating Seats
    Pool Ready Ragged Columns trunk trunks Keep Sight mix_layer write_layer
    to_places to_rows Climb climb climbing halt halted foresee fold folds
    Together Apart edit_each owner owners lone_ridge ease eased easing bare
    held held_active prior Workbench workbench Outcome judging Kept kept_pieces
    States Memory recall Record Passage faults fault told places room rooms
    tile tiles seat seats seating frame frames evict shared_metric UNEDITED_
    adaptor autoregressive
    """.split())
# Where such a word is somebody else's, or means what it means everywhere.
ALLOWED = {
    'kernels': {'tiles', 'tile'},
}


class RetiredNamesTest(absltest.TestCase):

  def test_none_is_used(self):
    found = []
    for folder in ('jaxedit', 'kernels', 'experiments'):
      retired = RETIRED - ALLOWED.get(folder, set())
      for path in sorted((ROOT / folder).rglob('*.py')):
        source = path.read_text('utf-8')
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
          if token.type == tokenize.NAME and token.string in retired:
            where = f'{path.relative_to(ROOT)}:{token.start[0]}'
            found.append(f'{where}: {token.string}')
    self.assertEmpty(found, '\n'.join(found))


if __name__ == '__main__':
  absltest.main()
