"""Clinical tables as they stand in public, written to files and read back as labels, ages and sexes."""

from pathlib import Path

from preprocessing.scans import Scan

OASIS1 = """ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay
OAS1_0001_MR1,F,R,74,2,3,29,0,1344,0.743,1.306,N/A
OAS1_0002_MR1,M,R,55,4,1,29,0.5,1147,0.810,1.531,N/A
OAS1_0003_MR1,F,R,21,,,,,1500,0.85,1.1,N/A
"""
OASIS1_EXPECTED = [
    ("OAS1_0001", "MR1", "normal", 74, "F"),
    ("OAS1_0002", "MR1", "abnormal", 55, "M"),
    ("OAS1_0003", "MR1", None, 21, "F"),
    ("OAS1_0003", "MR2", None, None, None),
    ("OAS1_0004", "MR1", None, None, None),
]
OASIS2 = """Subject ID,MRI ID,Group,Visit,MR Delay,M/F,Hand,Age,EDUC,SES,MMSE,CDR,eTIV,nWBV,ASF
OAS2_0001,OAS2_0001_MR1,Converted,1,0,M,R,80,14,2,27,0,1987,0.696,0.883
OAS2_0001,OAS2_0001_MR2,Converted,2,457,M,R,81,14,2,30,0.5,2004,0.681,0.876
OAS2_0002,OAS2_0002_MR1,Nondemented,1,0,F,R,75,12,,23,0,1678,0.736,1.046
"""
OASIS2_EXPECTED = [
    ("OAS2_0001", "MR1", "normal", 80, "M"),
    ("OAS2_0001", "MR2", "abnormal", 81, "M"),
    ("OAS2_0002", "MR1", "normal", 75, "F"),
    ("OAS2_0002", "MR2", None, None, None),
]
OASIS3 = """OASISID,OASIS_session_label,days_to_visit,age at visit,CDRTOT
OAS30001,OAS30001_UDSb4_d0000,0,65.1,0
OAS30001,OAS30001_UDSb4_d0800,0800,67.3,0.5
OAS30002,OAS30002_UDSb4_d0000,0,70.0,0
OAS30003,OAS30003_UDSb4_d0100,100,71,
OAS30003,OAS30003_UDSb4_d0200,200,72,1
"""
BIDS = "participant_id\tage\tsex\tdiagnosis\nsub-01\t33\tF\tcontrol\nsub-02\t44\tM\tschizophrenia\n03\tn/a\tn/a\tn/a\n"
ADNI = """"Image Data ID","Subject","Group","Sex","Age","Visit","Modality","Description","Type","Acq Date","Format"
"I45117","002_S_0413","CN","F","76","bl","MRI","MPR","Processed","5/19/2006","NiFTI"
"I45118","002_S_0413","CN","F","77","m12","MRI","MPR","Processed","5/19/2007","NiFTI"
"I9","005_S_0223","MCI","M","78","sc","MRI","MPR","Processed","3/02/2006","NiFTI"
"""
ADNIMERGE = """RID,PTID,VISCODE,EXAMDATE,DX_bl,AGE,PTGENDER,Years_bl,DX
3,011_S_0003,bl,2005-09-12,CN,81.3,Male,0,CN
3,011_S_0003,m24,2007-09-12,CN,81.3,Male,2.0,Dementia
4,022_S_0004,bl,2005-11-08,LMCI,67.5,Female,0,MCI
5,022_S_0005,m06,2006-05-02,CN,67.5,Female,0.5,
"""
IXI = """IXI_ID,"SEX_ID (1=m, 2=f)",HEIGHT,WEIGHT,ETHNIC_ID,AGE,DATE_AVAILABLE,STUDY_DATE
2,2,164,58,1,35.80,1,2005-11-18
12,1,175,70,1,38.78,1,2005-10-20
105,0,0,0,0,,1,
"""


def make_scan(subject, session="", name=None, label=""):
    name = name or (f"{subject}_{session}" if session else subject)
    return Scan(Path(f"{name}.nii"), name, "", label, subject, session, None, None)


def write(tmp_path, content, name="table.csv"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_facts(clinical, scans):
    rows = [clinical.find(scan) for scan in scans]
    return [(row.label, row.age, row.sex) if row else (None, None, None) for row in rows]


def read_labels(clinical):
    return {rows[0].name: rows[0].label for rows in clinical.rows.values()}
