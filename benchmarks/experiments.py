"""Experiments on the whole depth of SmolLM2-135M, perplexity on validation text; what did not pay is only here.

    OMP_NUM_THREADS=1 python benchmarks/experiments.py '{"compute_dtype": "bfloat16"}' NAME

Keys beside those of `PruneOptions`: `blocks` (stop after so many), `fisher` (error weighed by the Fisher matrix of the
block's output), `mix` (inputs between the pruned and the dense stream), `group` (so many blocks optimised as one), `aug`
(windows that the dense model writes itself, or with tokens replaced), `last` (the last round's mask stays), `sr` (decay
of pruned weights, SR-STE), `ratios` (sparsity by block, by depth or by outliers), `kd` (then all blocks together towards
the dense model's predictions, masks fixed).
"""
import sys, json, time, math
import torch
torch.set_num_threads(1)
from torch import nn
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from wandazeta.callbacks.pruning.options import PruneOptions
from wandazeta.callbacks.pruning import pruner as P, one_block as OB, regional as R
from wandazeta.datamodules import TextDataModule
from records import ROOT
M=str(ROOT/'.cache/wandazeta/smollm2-135m')
spec=json.loads(sys.argv[1]); name=sys.argv[2]
samples=spec.pop('samples',32); tokens=spec.pop('tokens',256); seed=spec.get('seed',0); evalw=spec.pop('evalw',16)
fisher=spec.pop('fisher',None); damp=spec.pop('damp',0.1); mix=spec.pop('mix',None); kd=spec.pop('kd',None); split=spec.pop('split','val'); blocks=spec.pop('blocks',30); last=spec.pop('last',False); betas=spec.pop('betas',None); group=spec.pop('group',1); ratios=spec.pop('ratios',None); aug=spec.pop('aug',None); sr=spec.pop('sr',0.0)
d=TextDataModule('sample:wikipedia',tokenizer=M,sequence_length=tokens,num_calibration_samples=samples,seed=seed)
w=torch.cat([b['input_ids'] for b in d.calibration_dataloader()])
ev=TextDataModule('sample:wikipedia',tokenizer=M,sequence_length=512).windows(split)[:evalw]
model=AutoModelForCausalLM.from_pretrained(M,dtype=torch.float32).eval()
t0=time.time(); c0=time.process_time()
if aug:
    kind,mult=aug[0],aug[1]; g=torch.Generator().manual_seed(7)
    n,T=w.shape; extra=[]
    if kind=='gen':
        P0=16
        pre=torch.cat([w[:,o:o+P0] for o in [int(round(k*(T-P0)/mult)) for k in range(mult)]])
        torch.manual_seed(7)
        with torch.autocast('cpu',torch.bfloat16):
            e=model.generate(pre,attention_mask=torch.ones_like(pre),do_sample=True,temperature=aug[2] if len(aug)>2 else 1.0,top_k=0,top_p=1.0,min_new_tokens=T-P0,max_new_tokens=T-P0,pad_token_id=0)
        extra=e[:,:T]
    else:
        flat=w.flatten()
        e=w.repeat(mult,1); r=torch.rand(e.shape,generator=g)<aug[2]
        extra=torch.where(r,flat[torch.randint(len(flat),e.shape,generator=g)],e)
    w=torch.cat([w,extra]); print('aug',w.shape,time.time()-t0,flush=True)
    from transformers import AutoTokenizer
    print(AutoTokenizer.from_pretrained(M).decode(extra[0])[:400],flush=True)
def ppl(model):
    l=0;c=0
    with torch.inference_mode():
        for x in ev:
            lo=model(input_ids=x[None],use_cache=False).logits[0,:-1]
            l+=F.cross_entropy(lo.double(),x[1:],reduction='sum').item(); c+=len(x)-1
    return math.exp(l/c)
layers=model.model.layers
if group>1:
    class Group(nn.Module):
        def __init__(s,ls): super().__init__(); s.ls=nn.ModuleList(ls)
        def forward(s,h,**k):
            for l in s.ls: h=l(h,**k)
            return h
    model.model.layers=nn.ModuleList(Group(layers[i:i+group]) for i in range(0,30,group))
if fisher:
    model.requires_grad_(False)
    FI=[torch.zeros(576,576,dtype=torch.float64) for _ in layers]
    outs={}
    hs=[]
    for i,l in enumerate(layers):
        def hook(m,a,o,i=i):
            h=o if isinstance(o,torch.Tensor) else o[0]
            h.retain_grad() if h.requires_grad else None
            outs[i]=h
        hs.append(l.register_forward_hook(hook))
    g=torch.Generator().manual_seed(0)
    for x in w:
        emb=model.get_input_embeddings()(x[None]).requires_grad_(True)
        lo=model(inputs_embeds=emb,use_cache=False).logits[0]
        if fisher.startswith('s'):  # sampled labels
            lab=torch.multinomial(lo.detach().softmax(-1),1,generator=g)[:,0]
            loss=F.cross_entropy(lo,lab,reduction='sum')
        else:
            loss=F.cross_entropy(lo[:-1],x[1:],reduction='sum')
        loss.backward()
        for i in outs:
            gr=outs[i].grad[0].double(); FI[i]+=gr.t()@gr
        outs.clear()
    for h in hs: h.remove()
    ROOT=[]
    for f in FI:
        f=f/f.diagonal().mean()
        ev_=torch.linalg.eigvalsh(f)
        if fisher.endswith('diag'): f=torch.diag(f.diagonal())
        ROOT.append(torch.linalg.cholesky(f+damp*torch.eye(576,dtype=torch.float64)).float())
        if len(ROOT) in (1,15,30): print('eig quantiles',[round(float(q),4) for q in torch.quantile(ev_,torch.tensor([0,.1,.5,.9,.99,1],dtype=torch.float64))],flush=True)
    print('fisher seconds',time.time()-t0,flush=True)
    cur=[0]
    oi=OB.OneBlock.__init__
    def init(self,index,*a,**k): cur[0]=index; oi(self,index,*a,**k)
    OB.OneBlock.__init__=init
    def loss_(output,target,mask=None):
        return ((output.float()-target.float())@ROOT[cur[0]]).square().mean()
    R.optimisation_loss=loss_
if mix:
    stash=[None]
    oc=P._Pruner._prune_calibrated
    def pc(self,index,work,samples):
        stash[0]=list(self.stream) if self.stream is not None and index>0 else None
        return oc(self,index,work,samples)
    P._Pruner._prune_calibrated=pc
    ob=OB.optimise_block
    rg=torch.Generator().manual_seed(1)
    class Mix:
        def __init__(s,a,b): s.a=a; s.b=b
        def __len__(s): return len(s.a)
        def __getitem__(s,i):
            l=float(torch.rand(1,generator=rg)); l = l*mix if mix<=1 else (l<0.5)
            return torch.lerp(s.a[i],s.b[i],float(l))
    def obw(run,master,prune,hidden,*a,**k):
        return ob(run,master,prune,hidden if stash[0] is None else Mix(hidden,stash[0]),*a,**k)
    OB.optimise_block=obw
if betas:
    R._make_optimizer=lambda parameters,o: torch.optim.AdamW(parameters,lr=o.learning_rate,weight_decay=0.0,betas=tuple(betas),fused=True)
if last:
    op,oo=OB.OneBlock.prune,OB.OneBlock.optimise
    def pr(self):
        if getattr(self,'done',False): self.master.apply_masks(self.lastk); return self.lastk
        self.lastk=op(self); return self.lastk
    def opt_(self,*a): oo(self,*a); self.done=True
    OB.OneBlock.prune=pr; OB.OneBlock.optimise=opt_
if sr:
    ot=R.MasterWeights.take_gradients
    def tg(self,scale):
        ot(self,scale)
        with torch.no_grad():
            for n,m in self.masters.items():
                if n in self._masks: m.grad.add_(m*(~self._masks[n]),alpha=sr*float(m.grad.abs().mean())/float(m.abs().mean()))
    R.MasterWeights.take_gradients=tg
if ratios:
    import dataclasses
    kind,lam=ratios; s0=spec['sparsity']
    if kind=='depth': rel=torch.linspace(-1,1,30)              # later blocks sparser
    elif kind=='owl':
        stats=[]
        from wandazeta.callbacks.pruning.statistics import InputStatistics
        rel=[]
        from wandazeta.callbacks.pruning.layers import prunable_layers
        o=PruneOptions(method='wanda',sparsity_pattern='unstructured',sparsity=s0)
        lays=[prunable_layers(l,o) for l in layers]
        sts=[InputStatistics(a) for a in lays]
        from contextlib import ExitStack
        with ExitStack() as st, torch.no_grad():
            for q in sts: st.enter_context(q.collect())
            for x in w.split(8): model(input_ids=x,use_cache=False)
        for a,q in zip(lays,sts):
            q.num_samples=1
            sc=torch.cat([(l.weight.detach().abs()*q.norm(n)).flatten() for n,l in a.items()])
            rel.append(float((sc>5*sc.mean()).float().mean()))
        rel=torch.tensor(rel); print('outliers',[round(float(v),4) for v in rel],flush=True)
        rel=-(rel-rel.min())/(rel.max()-rel.min())*2
        rel=rel-rel.mean()
    si=[float(s0+lam*v) for v in rel]; print(si,flush=True)
    oi2=OB.OneBlock.__init__
    def init2(self,index,layers_,options,*a,**k): oi2(self,index,layers_,dataclasses.replace(options,sparsity=si[index]),*a,**k)
    OB.OneBlock.__init__=init2
base=dict(method='wanda++',alpha=5.0,rounds=4,samples_per_round=samples,optimizer='rmsprop',learning_rate=5e-4,lr_schedule='linear',target='dense_stream',mask_mode='straight_through')
base.update(spec)
losses=[]
def on(rec,n):
    losses.append(rec.loss_after)
    if rec.index%10==9 if hasattr(rec,'index') else len(losses)%10==0: print(name,len(losses),round(time.time()-t0),flush=True)
if base['method']!='none':
    try: P.prune_model(model,lambda b:model(input_ids=b,use_cache=False),list(w.split(8)),PruneOptions(**base),on_block=on,should_stop=lambda: len(losses)>=blocks)
    except P.PruningInterrupted: pass
model.model.layers=layers
p=ppl(model); res=dict(name=name,ppl=p,losses=[round(x,6) for x in losses][:6],wall=time.time()-t0,cpu=time.process_time()-c0,spec=json.loads(sys.argv[1]))
print(json.dumps(res),flush=True)
open(ROOT/'runs'/'experiments.jsonl','a').write(json.dumps(res)+'\n')
if kd:
    dense=AutoModelForCausalLM.from_pretrained(M,dtype=torch.float32).eval().requires_grad_(False)
    lin=[m.weight for m in layers.modules() if isinstance(m,nn.Linear)]
    masks=[q!=0 for q in lin]
    model.requires_grad_(False)
    for q in lin: q.requires_grad_(True)
    opt=torch.optim.AdamW(lin,lr=kd['lr'],weight_decay=0.0,betas=(0.9,0.95),fused=True)
    n=kd['epochs']*len(w); sch=torch.optim.lr_scheduler.LambdaLR(opt,lambda s:min(1,(s+1)/10)*(1-s/n))
    gen=torch.Generator().manual_seed(2); k=0
    ctx=torch.autocast('cpu',torch.bfloat16,enabled=kd.get('bf16',False))
    for e in range(kd['epochs']):
        for i in torch.randperm(len(w),generator=gen).tolist():
            with torch.no_grad(), ctx: tl=dense(input_ids=w[i:i+1],use_cache=False).logits[0].float().log_softmax(-1)
            with ctx: sl=model(input_ids=w[i:i+1],use_cache=False).logits[0]
            loss=F.kl_div(sl.float().log_softmax(-1),tl,log_target=True,reduction='batchmean')
            loss.backward()
            for q,m in zip(lin,masks): q.grad.mul_(m)
            opt.step(); sch.step(); opt.zero_grad()
        p=ppl(model); print(name,'kd epoch',e,p,round(time.time()-t0),flush=True)
    res=dict(name=name+'+kd',ppl=p,wall=time.time()-t0,cpu=time.process_time()-c0,spec=json.loads(sys.argv[1]))
    open(ROOT/'runs'/'experiments.jsonl','a').write(json.dumps(res)+'\n')
