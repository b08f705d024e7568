from memjax.cli import entry

entry()
