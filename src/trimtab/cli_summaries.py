"""The verbs of the command line, and what each does."""

VERBS = {
    "tune": "Tune a small model on your text: the expert.",
    "record": "Record the soft targets of an expert and its reference over a text.",
    "fit": "Fit an adapter's carriers to a recording.",
    "append": "Append text to an adapter's memory: one pass of the small model, nothing is fitted.",
    "mount": "Seat an adapter on a host: closed form, no training.",
    "export": "Export an adapter's mounted head for engines that run without Trimtab.",
    "generate": "Continue a prompt with a steered host.",
    "evaluate": "Measure what an adapter changes on a host: domain text and general text.",
    "cost": "Estimate what each way to adapt a host costs: computation, memory, hours, money.",
    "serve": "Serve a host and adapters to OpenAI's clients, over HTTP.",
    "compare": "Compare ways to adapt a host on your own data: quality, cost, time, flexibility.",
}
"""What each verb does: the first line of its configuration's docstring."""
OF_HOSTS = {
    "probe": "Find out what a host lets us see, and which carriers can steer it.",
}
"""Verbs of the group `hosts`."""
