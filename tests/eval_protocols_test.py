"""Steps of protocols by hand; no case is cut, nothing is edited twice."""

from absl.testing import absltest, parameterized

from jaxedit.eval import protocols
from jaxedit.eval.protocols import Step
from jaxedit.types import EditRequest

# Five cases; the second has two requests, which need not stand together.
CASES = (0, 1, 2, 1, 3, 4)


class ProtocolTest(parameterized.TestCase):

  def test_independent(self):
    every = tuple(range(6))
    found = protocols.independent()
    self.assertEqual(list(found.steps(CASES)), [Step(every, every)])
    self.assertTrue(found.alone and found.reset)
    some = list(protocols.independent(2).steps(CASES))
    self.assertEqual([s.batch for s in some], [(0, 1, 3), (2, 4), (5,)])
    self.assertEqual([s.judge for s in some], [(0, 1, 3), (2, 4), (5,)])

  @parameterized.parameters(True, False)
  def test_batches(self, reset):
    found = protocols.batches(3, reset=reset)
    self.assertEqual((found.alone, found.reset), (False, reset))
    steps = list(found.steps(CASES))
    self.assertEqual([s.batch for s in steps], [(0, 1, 2, 3), (4, 5)])
    self.assertEqual([s.judge for s in steps], [(0, 1, 2, 3), (4, 5)])

  @parameterized.parameters(
      ('final', [(), (), (0, 1, 2, 3, 4, 5)]),
      ('immediate', [(0, 1, 3), (2, 4), (5,)]),
      ((2, 5), [(0, 1, 3), (), (0, 1, 2, 3, 4, 5)]),
      # A number inside a batch is reached after it; one past the end never.
      ((3, 9), [(), (0, 1, 2, 3, 4), ()]),
      ((), [(), (), ()]),
  )
  def test_sequence(self, judge_at, wanted):
    found = protocols.sequence(2, judge_at=judge_at)
    self.assertFalse(found.reset or found.alone)
    steps = list(found.steps(CASES))
    self.assertEqual([s.batch for s in steps], [(0, 1, 3), (2, 4), (5,)])
    self.assertEqual([s.judge for s in steps], wanted)

  @parameterized.product(
      protocol=(
          protocols.independent(),
          protocols.independent(3),
          protocols.batches(2),
          protocols.batches(100, reset=False),
          protocols.sequence(1, judge_at='immediate'),
          protocols.sequence(4),
      ),
      cases=((), (0,), (0, 0, 0), CASES, tuple(range(17))),
  )
  def test_every_request_is_edited_once_and_judged(self, protocol, cases):
    steps = list(protocol.steps(cases))
    edited = [i for step in steps for i in step.batch]
    self.assertCountEqual(edited, range(len(cases)))
    self.assertEqual({i for s in steps for i in s.judge}, {*range(len(cases))})
    for step in steps:
      mine = {cases[i] for i in step.batch}
      others = {cases[i] for i in range(len(cases)) if i not in step.batch}
      self.assertEmpty(mine & others)
      self.assertNotEmpty(step.batch)

  def test_protocols_are_values(self):
    self.assertEqual(protocols.batches(3), protocols.batches(3))
    one = protocols.sequence(2, judge_at=[1, 2])
    self.assertEqual(hash(one), hash(protocols.sequence(2, judge_at=(1, 2))))

  def test_case_numbers(self):
    requests = [
        EditRequest(i, str(i), 'Why?', None, 'So.', case=case)
        for i, case in enumerate(['', 'x', '', 'x', 'y', ''])
    ]
    self.assertEqual(protocols.case_numbers(requests), (0, 1, 2, 1, 3, 4))
    self.assertEqual(protocols.case_numbers([]), ())


if __name__ == '__main__':
  absltest.main()
