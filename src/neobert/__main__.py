"""`python -m neobert`: the same as the `neobert` command."""

from neobert.ranks import end_with_launcher

end_with_launcher()

from neobert.cli.main import main  # noqa: E402

main()
