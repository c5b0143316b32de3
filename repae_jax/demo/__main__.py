"""Serves a page to play with a model: `python -m repae_jax.demo runs/repae`.

Class, guidance and its interval, steps and seed by hand; the way of a sample from noise to data, with its latents; the same
noise at several checkpoints side by side. While the run trains, newer checkpoints appear by themselves.
"""

from repae_jax import cli
from repae_jax.demo.server import make_server
from repae_jax.demo.studio import Studio


def parse_args(argv=None):
    """Command line of this program."""
    parser = cli.Parser(prog="python -m repae_jax.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("workdir", type=cli.path, help="folder of a run; or a published run, or an exported pipeline")
    parser.add_argument("--vae", type=cli.path, help="the VAE of a model that holds none")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others in; default %(default)s")
    parser.add_argument("--port", type=cli.whole(0, 65535), default=8000, help="0 is any that is free; default %(default)s")
    return parser.parse_args(argv)


@cli.command(parse_args)
def main(args):
    """Entry point."""
    studio = Studio(args.workdir, args.vae)
    with make_server(studio, args.host, args.port) as server:
        print(f"http://{args.host}:{server.server_port} (Ctrl-C ends it)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
