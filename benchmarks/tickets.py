"""Another name of ``sparsekit bench tickets``, with its own options.

    python benchmarks/tickets.py --threads 2 --json out.json
"""

from sparsekit.bench.tickets import main

if __name__ == "__main__":
    main()
