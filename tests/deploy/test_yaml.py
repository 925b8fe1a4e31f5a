"""Every YAML file of deploy/, read by yamllint."""

from tests.deploy.conftest import DEPLOY, run_tool

RULES = """\
extends: default
rules:
  document-start: disable
  line-length: {max: 120}
  comments: {min-spaces-from-content: 1}
"""


def test_yamllint_has_no_objection() -> None:
    run_tool("yamllint", "--strict", "-d", RULES, DEPLOY)
