"A bundle of untrained networks in the shipped layout, so that tests of the road need no trained ones."
import torch
from cycle_nb.core import make_card, seed_all
from cycle_nb.encoder import Encoder
from cycle_nb.losses import Attributes, Identity, Perceptual, save_net
from cycle_nb.stylegan2 import Generator
from cycle_nb.weights import save_model

BODY = dict(widths=(8, 8, 12, 12, 16), depth=(1, 1, 1, 1, 1))

def write_bundle(folder, edits=('age', 'glasses', 'smile', 'yaw')):
    "Generator, feature networks, encoders and directions with random weights."
    seed_all(0)
    folder.mkdir(parents=True, exist_ok=True)
    G = Generator(channel_base=512, channel_max=16)
    save_model(G, folder/'generator.safetensors', make_card('generator', seed=0))
    for name, net in dict(perceptual=Perceptual(**BODY), identity=Identity(**BODY), attributes=Attributes(**BODY)).items():
        save_net(net, folder/f'{name}.safetensors', make_card(name, seed=0))
    for name, stage in dict(w=0, wplus=G.num_ws - 1, cycle=0).items():
        E = Encoder(w_avg=G.w_avg, stage=stage).eval()
        for head in E.heads[1:]: torch.nn.init.normal_(head.linear.weight, std=.3)
        save_model(E, folder/f'{name}.safetensors', make_card(name, seed=0))
    write_directions(folder, {k: torch.randn(G.w_dim) for k in edits})
    return folder
