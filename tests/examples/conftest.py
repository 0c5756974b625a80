from command_fixtures import log_file, run_command, run_example, run_forked, run_python, trained  # noqa: F401
